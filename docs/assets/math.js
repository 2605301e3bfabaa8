// Renders the mathematics of a page: what pymdownx.arithmatex marked, and the text cells of notebooks.
document$.subscribe(() => {
  const brackets = [
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];
  const dollars = [
    { left: "$$", right: "$$", display: true },
    { left: "$", right: "$", display: false },
  ];
  const render = (selector, delimiters) =>
    document
      .querySelectorAll(selector)
      .forEach((element) => renderMathInElement(element, { delimiters, throwOnError: false }));
  render(".arithmatex", brackets);
  render(".jp-RenderedMarkdown", dollars);
});
