"""Comparisons with peers in one run; ratios count, seconds depend on the machine."""
