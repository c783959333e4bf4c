"use strict";
// Draws every chart in the reader's colours and fills the picker; the page's data lie in the element #data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const printing = window.matchMedia("print");
  const drawn = new Map();

  const config = () => {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const text = { labelColor: colour("--soft"), titleColor: colour("--soft"), titleFontWeight: 500 };
    return {
      background: "transparent",
      font: getComputedStyle(document.body).fontFamily,
      view: { stroke: "transparent" },
      axis: { ...text, gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line") },
      legend: text,
      rule: { color: colour("--ink") },
      text: { color: colour("--ink") },
      range: { category: ["#4c78a8", "#e4793c", "#3a9d8f", "#b4589e", "#b08a2e", "#7a6fc9"] },
    };
  };

  const draw = async (id, spec) => {
    const element = document.getElementById(id);
    const before = drawn.get(id);
    const options = { mode: "vega-lite", renderer: "svg", actions: false, config: config() };
    const result = await vegaEmbed(element, spec, options);
    if (before) before.view.finalize();
    drawn.set(id, { spec, view: result.view });
    root.dataset.drawn = String(drawn.size);
  };

  const drawAll = (specs) => Promise.all(Object.entries(specs).map(([id, spec]) => draw(id, spec)));

  const bins = (histogram) => {
    const width = (histogram.high - histogram.low) / histogram.kept.length;
    const rows = [];
    for (const what of ["kept", "pruned"]) {
      histogram[what].forEach((count, index) => {
        const start = histogram.low + index * width;
        if (count > 0) rows.push({ what, count, start, end: start + width });
      });
    }
    return rows;
  };

  const percent = (value) => (100 * value).toFixed(2) + " %";

  const show = async (index) => {
    const matrix = data.matrices[index];
    const facts = [`${matrix.shape[0]} × ${matrix.shape[1]}`, `${percent(matrix.sparsity)} zero`];
    if (matrix.error !== null) facts.push(`layer error ${percent(matrix.error)}`);
    if (matrix.tokens !== null) facts.push(`${matrix.tokens.toLocaleString("en")} calibration inputs`);
    document.getElementById("matrix-facts").textContent = facts.concat(matrix.events).join(" · ");
    document.getElementById("matrix-facts").dataset.matrix = matrix.name;
    const found = matrix.distributions || {};
    for (const [kind, spec] of Object.entries(data.distributions)) {
      const id = "distribution-" + kind;
      const histogram = found[kind];
      document.getElementById(id).parentElement.hidden = !histogram;
      if (histogram) await draw(id, { ...spec, data: { values: bins(histogram) } });
    }
  };

  // What stands behind the address need not be what the page put there: `%` alone is no code of a letter.
  const decoded = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };

  const picker = () => {
    const select = document.getElementById("matrix");
    if (!select) return Promise.resolve();
    data.matrices.forEach((matrix, index) => select.add(new Option(matrix.name, String(index))));
    const asked = decoded(location.hash.replace(/^#matrix=/, ""));
    const first = data.matrices.findIndex((matrix) => matrix.name === asked);
    select.value = String(Math.max(0, first));
    const pick = (index) => {
      const count = data.matrices.length;
      select.value = String((index + count) % count);
      return show(Number(select.value));
    };
    select.addEventListener("change", () => pick(Number(select.value)));
    document.getElementById("previous").addEventListener("click", () => pick(Number(select.value) - 1));
    document.getElementById("next").addEventListener("click", () => pick(Number(select.value) + 1));
    return pick(Number(select.value));
  };

  const copying = () => {
    for (const button of document.querySelectorAll("button[data-copy]")) {
      button.addEventListener("click", async () => {
        const source = document.getElementById(button.dataset.copy);
        try {
          await navigator.clipboard.writeText(source.textContent);
        } catch {
          // A page opened from a file may have no clipboard of its own; the old way needs a selection.
          getSelection().selectAllChildren(source);
          document.execCommand("copy");
        }
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 1500);
      });
    }
  };

  const redraw = () => Promise.all([...drawn].map(([id, { spec }]) => draw(id, spec)));

  const start = async () => {
    copying();
    await drawAll(data.charts);
    await picker();
    dark.addEventListener("change", redraw);
    printing.addEventListener("change", redraw);
    root.dataset.ready = "yes";
  };
  start().catch((error) => {
    root.dataset.ready = "failed";
    console.error(error);
  });
})();
