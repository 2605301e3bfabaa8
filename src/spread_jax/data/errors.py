"""The one exception of the data layer."""


class DatasetError(ValueError):
    """A data set cannot be read as asked; the message names what was found and what to do."""
