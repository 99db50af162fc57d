"use strict";
// Draws the charts of a report and answers its controls. What is drawn lies in the page; nothing is fetched.

const { charts, on_dark: onDark } = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const THEMES = { light: { text: "#1a1a1a", grid: "#dddddd" }, dark: { text: "#e8e8e8", grid: "#44484f" } };
// Only these: the library has a button that would upload a chart, too.
const BUTTONS = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
const CONFIG = { displaylogo: false, modeBarButtons: BUTTONS, toImageButtonOptions: { format: "svg" } };
const PRINT_WIDTH = 660; // pixels: of A4 between margins of 15 mm
const RESIZE_PAUSE = 100; // milliseconds

// The library is packed in the page: a third of its size.
async function unpackLibrary() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function startChart(section) {
  const spec = charts[section.id];
  const plot = section.querySelector(".plot");
  const logX = section.querySelector(".log-x");
  const logY = section.querySelector(".log-y");
  const hidden = new Set();
  const shown = (part) => !part.groups.some((group) => hidden.has(group));
  const axisName = () => section.querySelector(".axis:checked").value;

  function draw(printing) {
    const name = axisName();
    const axis = spec.axes[name];
    const isDark = dark.matches && !printing;
    const { text, grid } = isDark ? THEMES.dark : THEMES.light;
    const colored = (key, value) => (isDark && key.endsWith("color") && onDark[value]) || value;
    const { traces, layout } = JSON.parse(JSON.stringify({ traces: spec.traces, layout: spec.layout }), colored);
    const drawn = traces.filter((trace) => spec.columns[trace.at][name]);
    for (const trace of drawn) {
      trace.x = spec.columns[trace.at][name];
      trace.visible = shown(trace);
      if (trace.hovertemplate) trace.hovertemplate = trace.hovertemplate.replace("{x}", axis.hover && `<br>${axis.hover}`);
    }
    layout.shapes = (layout.shapes || []).map((shape) => ({ ...shape, visible: shown(shape) }));
    layout.width = printing ? PRINT_WIDTH : plot.clientWidth;
    const lines = { gridcolor: grid, linecolor: text, zerolinecolor: grid };
    const nticks = Math.max(4, Math.round(layout.width / 120));
    layout.xaxis = { nticks, ...axis.layout, ...lines, ...(logX?.checked && { type: "log" }) };
    layout.yaxis = { ...layout.yaxis, ...lines, ...(logY?.checked && { type: "log" }) };
    layout.font = { ...layout.font, color: text };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: text };
    // What the reader zoomed to stays while curves come and go, but not on another axis.
    layout.uirevision = [name, logX?.checked, logY?.checked].join();
    return Plotly.react(plot, drawn, layout, CONFIG);
  }

  function chooseAxis() {
    if (logX) logX.checked = spec.axes[axisName()].log;
    return draw();
  }

  for (const input of section.querySelectorAll(".axis")) input.addEventListener("change", chooseAxis);
  for (const input of section.querySelectorAll(".log-x, .log-y")) input.addEventListener("change", () => draw());
  for (const button of section.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const group = button.dataset.group;
      if (!hidden.delete(group)) hidden.add(group);
      button.setAttribute("aria-pressed", String(!hidden.has(group)));
      draw();
    });
  }
  addEventListener("beforeprint", () => draw(true));
  addEventListener("afterprint", () => draw());
  dark.addEventListener("change", () => draw());
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, RESIZE_PAUSE);
  });
  return chooseAxis();
}

function sortTable(header) {
  const rising = header.getAttribute("aria-sort") !== "ascending";
  const body = header.closest("table").tBodies[0];
  const value = (row) => row.cells[header.cellIndex].dataset.value;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (rising ? 1 : -1);
  // What has no value comes last either way.
  const rows = [...body.rows].sort((a, b) => (value(a) && value(b) ? compare(value(a), value(b)) : value(a) ? -1 : value(b) ? 1 : 0));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortTable(button.closest("th")));
}
unpackLibrary()
  .then(() => Promise.all([...document.querySelectorAll("section.chart")].map(startChart)))
  .then(() => document.body.classList.add("drawn"))
  .catch((error) => {
    document.getElementById("failure").hidden = false;
    throw error;
  });
