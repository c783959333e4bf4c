"use strict";
// Fills the list of matrices and draws the histograms of the selected one, from the data in the element #data.
// The rest of the page works without scripts.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const svg = "http://www.w3.org/2000/svg";

  const made = (parent, name, attributes, text) => {
    const drawn = name === "svg" || parent instanceof SVGElement;
    const element = drawn ? document.createElementNS(svg, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };

  // About four round numbers between two values.
  const ticks = (low, high) => {
    const rough = (high - low) / 4;
    const size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(6)));
    return found;
  };

  const histogram = (element, [low, high, top, kept, pruned]) => {
    const height = (digit) => data.digits.indexOf(digit ?? "0") / (data.digits.length - 1);
    element.replaceChildren();
    made(element, "div", { class: "title" }, element.dataset.title);
    const legend = made(element, "div", { class: "legend" });
    for (const [kind, name] of pruned ? [["kept", "kept"], ["pruned", "pruned"]] : [["kept", "all channels"]]) {
      const entry = made(legend, "span", {});
      made(entry, "i", { class: kind });
      entry.append(name);
    }
    const area = made(element, "div", { class: "area" });
    const chart = made(area, "svg", { viewBox: `0 0 ${kept.length} 1`, preserveAspectRatio: "none" });
    const place = (bin) => (low + (bin * (high - low)) / kept.length).toFixed(2);
    for (let bin = 0; bin < kept.length; bin++) {
      let below = 0;
      for (const [kind, bins] of [["pruned", pruned], ["kept", kept]]) {
        const share = height(bins[bin]);
        if (!share) continue;
        const size = Math.min(share, 1 - below);
        const bar = made(chart, "rect", { class: kind, x: bin + 0.04, width: 0.92, y: 1 - below - size, height: size });
        made(bar, "title", {}, `${kind}: about ${Math.round(share * top).toLocaleString("en")} from ${place(bin)} to ${place(bin + 1)}`);
        below += size;
      }
    }
    for (const tick of ticks(low, high)) {
      made(area, "span", { class: "x", style: `left:${((100 * (tick - low)) / (high - low)).toFixed(1)}%` }, String(tick));
    }
  };

  const percent = (value) => (100 * value).toFixed(2) + " %";

  const show = (index) => {
    const [name, shape, sparsity, error, tokens, events, charts] = data.matrices[index];
    const facts = [name, shape, `${percent(sparsity)} zero`];
    if (error !== null) facts.push(`layer error ${percent(error)}`);
    if (tokens !== null) facts.push(`${tokens.toLocaleString("en")} calibration inputs`);
    if (events) facts.push(events);
    const line = document.getElementById("matrix-facts");
    line.textContent = facts.join(" · ");
    line.dataset.matrix = name;
    for (const element of document.querySelectorAll(".histogram")) {
      const found = charts[element.id.replace("distribution-", "")];
      element.hidden = !found;
      if (found) histogram(element, found);
    }
  };

  // The address's fragment may not be the page's own: a lone `%` is invalid.
  const decoded = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };

  const picker = () => {
    const select = document.getElementById("matrix");
    if (!select) return;
    data.matrices.forEach(([name], index) => select.add(new Option(name, String(index))));
    const asked = decoded(location.hash.replace(/^#matrix=/, ""));
    const first = data.matrices.findIndex(([name]) => name === asked);
    const pick = (index) => {
      const count = data.matrices.length;
      select.value = String((index + count) % count);
      show(Number(select.value));
    };
    select.addEventListener("change", () => pick(Number(select.value)));
    document.getElementById("previous").addEventListener("click", () => pick(Number(select.value) - 1));
    document.getElementById("next").addEventListener("click", () => pick(Number(select.value) + 1));
    pick(Math.max(0, first));
  };

  const copying = () => {
    for (const button of document.querySelectorAll("button[data-copy]")) {
      button.addEventListener("click", async () => {
        const source = document.getElementById(button.dataset.copy);
        try {
          await navigator.clipboard.writeText(source.textContent);
        } catch {
          // A page opened from a file may lack the clipboard API; the old one copies a selection.
          getSelection().selectAllChildren(source);
          document.execCommand("copy");
        }
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 1500);
      });
    }
  };

  try {
    copying();
    picker();
    root.dataset.ready = "yes";
  } catch (error) {
    root.dataset.ready = "failed";
    console.error(error);
  }
})();
