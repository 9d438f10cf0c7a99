// What the page does beyond links and forms: sliders write their texts, charts are drawn, jobs are followed, code is
// copied, tables are pasted. Choosing is the server's: htmx sends the dials and puts its answer in place.
"use strict";

// Dials

const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];
const FACTORS = { b: 1, kb: 1e3, mb: 1e6, gb: 1e9, tb: 1e12, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40 };

function written(slider) {
  const at = Number(slider.value);
  const value = slider.dataset.scale === "log2" ? 2 ** at : at;
  if (slider.dataset.writes !== "bytes") return String(Number(value.toPrecision(3)));
  const [name, size] = UNITS.find(([, size]) => value >= size) || ["B", 1];
  return size === 1 ? `${Math.round(value)}B` : `${Number((value / size).toPrecision(4))}${name}`;
}

function read(text, writes) {
  const found = text.trim().match(/^([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)$/i);
  const factor = found && (writes === "bytes" ? FACTORS[found[2].toLowerCase() || "b"] : found[2] ? undefined : 1);
  return factor ? Number(found[1]) * factor : NaN;
}

function joinDial(slider) {
  const text = document.getElementById(slider.dataset.for);
  slider.addEventListener("input", () => {
    text.value = written(slider);
    slider.setAttribute("aria-valuetext", text.value);
  });
  text.addEventListener("input", () => {
    const value = read(text.value, slider.dataset.writes);
    if (!Number.isFinite(value)) return;
    slider.value = slider.dataset.scale === "log2" ? Math.log2(value) : value;
    slider.setAttribute("aria-valuetext", text.value);
  });
}

// Charts

const HEIGHT = 200;
const drawn = new Map(); // element -> uPlot

function tone(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function shape(context, kind, x, y, r) {
  context.beginPath();
  if (kind === "circle") context.arc(x, y, r, 0, 2 * Math.PI);
  if (kind === "square") context.rect(x - r, y - r, 2 * r, 2 * r);
  const corners = {
    triangle: [[0, -1.25], [1.15, 0.9], [-1.15, 0.9]],
    diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
  }[kind];
  if (corners) {
    for (const [dx, dy] of corners) context.lineTo(x + r * dx, y + r * dy);
    context.closePath();
  }
}

function drawRules(plot, chart) {
  const { ctx: context, bbox: box } = plot;
  const ratio = uPlot.pxRatio;
  context.save();
  context.strokeStyle = tone("accent");
  context.lineWidth = ratio;
  context.setLineDash([ratio, 3 * ratio]);
  const line = (x0, y0, x1, y1) => {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  };
  for (const y of chart.rules) {
    const at = plot.valToPos(y, "y", true);
    line(box.left, at, box.left + box.width, at);
  }
  for (const x of chart.x_rules) {
    const at = plot.valToPos(x, "x", true);
    line(at, box.top, at, box.top + box.height);
  }
  context.restore();
}

function drawMarks(plot, chart) {
  const context = plot.ctx;
  const ratio = uPlot.pxRatio;
  context.save();
  context.setLineDash([]); // that of a series drawn before
  for (const mark of [...chart.marks].sort((a, b) => a.chosen - b.chosen || b.small - a.small)) {
    const r = (mark.small ? 1.5 : 3.2) * ratio;
    const x = plot.valToPos(mark.x, "x", true);
    const y = plot.valToPos(mark.y, "y", true);
    const colour = tone(mark.tone);
    context.lineWidth = 1.4 * ratio;
    context.strokeStyle = colour;
    context.fillStyle = mark.filled ? colour : tone("surface");
    shape(context, mark.shape, x, y, r);
    context.fill();
    context.stroke();
    if (mark.chosen) {
      context.lineWidth = 1.8 * ratio;
      shape(context, "circle", x, y, r + 4.2 * ratio);
      context.stroke();
    }
  }
  context.restore();
}

function options(element, chart) {
  const overH = chart.x_label === "h";
  const number = (value) => (value == null ? "–" : value.toFixed(chart.decimals) + (chart.unit && ` ${chart.unit}`));
  const xNumber = (value) => (value == null ? "–" : overH ? String(value) : `${Number(value.toPrecision(4))} ${chart.x_unit}`);
  const axis = {
    stroke: tone("muted"),
    font: "12px system-ui, sans-serif",
    grid: { stroke: tone("line"), width: 1 },
    ticks: { show: false },
    gap: 6,
  };
  const x = chart.x;
  return {
    width: element.clientWidth,
    height: HEIGHT,
    padding: [10, 10, 0, 0],
    cursor: { drag: { x: false, y: false }, points: { show: false }, y: false, sync: overH ? { key: "h" } : undefined },
    scales: {
      x: { time: false, range: () => chart.x_range || [x[0] - 0.5, x[x.length - 1] + 0.5] },
      y: { range: () => chart.range },
    },
    axes: [
      { ...axis, size: 26, label: overH ? "horizon h" : `memory, ${chart.x_unit}`, labelSize: 18, labelGap: 0,
        labelFont: axis.font, grid: { show: false }, incrs: overH ? [1, 2, 5, 10, 20, 50, 100, 200, 500] : undefined },
      { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => String(Number(tick.toPrecision(6)))) },
    ],
    series: [
      { label: chart.x_label, value: (_, value) => xNumber(value) },
      ...chart.lines.map((line) => ({
        label: line.label,
        value: (_, value) => number(value),
        stroke: tone(line.tone),
        width: 1.2,
        dash: line.dash ? [5, 4] : undefined,
        points: { show: false },
        spanGaps: true,
        paths: overH ? uPlot.paths.linear() : uPlot.paths.stepped({ align: 1 }),
      })),
    ],
    legend: { markers: { show: false } },
    hooks: {
      drawAxes: [(plot) => drawRules(plot, chart)],
      draw: [(plot) => drawMarks(plot, chart)],
      setLegend: [(plot) => {
        if (plot.cursor.idx == null && plot.legend.idx == null) showChosen(plot, chart);
      }],
    },
  };
}

function showChosen(plot, chart) {
  const chosen = chart.marks.find((mark) => mark.chosen);
  const idx = chosen ? chart.x.indexOf(chosen.x) : -1;
  if (idx >= 0) plot.setLegend({ idx }, false);
}

function draw() {
  const holder = document.getElementById("choice");
  if (!holder || !holder.dataset.charts || !window.uPlot) return;
  const charts = JSON.parse(holder.dataset.charts);
  for (const element of document.querySelectorAll("[data-chart]")) {
    const chart = charts[element.dataset.chart];
    const place = element.querySelector(".plot");
    drawn.get(place)?.destroy();
    const plot = new uPlot(options(place, chart), [chart.x, ...chart.lines.map((line) => line.values)], place);
    drawn.set(place, plot);
    element.querySelector(".unit").textContent = chart.unit;
    showChosen(plot, chart);
  }
}

function bringChosen() {
  const row = document.querySelector(".tall tr.chosen");
  const holder = row?.closest(".tall");
  if (holder) holder.scrollTop = row.offsetTop - (holder.clientHeight - row.offsetHeight) / 2;
}

function fit() {
  for (const [place, plot] of drawn) {
    if (place.clientWidth && place.clientWidth !== plot.width) plot.setSize({ width: place.clientWidth, height: HEIGHT });
  }
}

// Jobs

const FINAL = ["succeeded", "failed", "cancelled"];

function follow(job) {
  const list = document.getElementById("job-events");
  const source = new EventSource(`/v1/jobs/${job.dataset.job}/events`);
  let last = Number(list.dataset.last);
  const told = (kind) => (event) => {
    const data = JSON.parse(event.data);
    if (Number(event.lastEventId) > last) {
      last = Number(event.lastEventId);
      show(kind, data);
    }
    if (!FINAL.includes(kind)) return;
    source.close();
    if (data.plan_id) location.replace(`/plans/${data.plan_id}`);
    else location.reload();
  };
  const show = (kind, data) => {
    const item = document.createElement("li");
    const [time, word, words] = ["time", "b", "span"].map((tag) => document.createElement(tag));
    time.dateTime = data.time;
    time.textContent = data.time.slice(11, 19);
    word.textContent = kind;
    words.textContent = data.message || data.reason || (data.error && data.error.message) || "";
    item.append(time, " ", word, " ", words);
    list.append(item);
    if (kind === "progress") {
      const bar = document.getElementById("job-progress");
      bar.max = data.total;
      bar.value = data.done;
      document.getElementById("job-message").textContent = data.message;
    } else {
      document.getElementById("job-state").textContent = kind === "requeued" ? "queued" : kind;
    }
  };
  source.addEventListener("open", () => (document.getElementById("job-lost").textContent = ""));
  source.addEventListener("error", () => {
    const gone = source.readyState === EventSource.CLOSED;
    const words = gone ? "The service no longer tells of this job. Load the page again." : "The service is away. Waiting for it.";
    document.getElementById("job-lost").textContent = words;
  });
  for (const kind of ["queued", "running", "progress", "requeued", "cancelling", ...FINAL]) {
    source.addEventListener(kind, told(kind));
  }
}

// The rest

async function copy(button) {
  const text = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text); // no clipboard beyond localhost without https: the keys of the browser do it
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

function paste(event) {
  const cell = event.target.closest(".entry input");
  const lines = event.clipboardData.getData("text").trim().split(/\r?\n/).map((line) => line.trim().split(/\t|;|,\s*|\s{2,}/));
  if (!cell || (lines.length === 1 && lines[0].length === 1)) return;
  event.preventDefault();
  const rows = [...document.querySelectorAll(".entry tbody tr:not(.told)")].map((row) => [...row.querySelectorAll("input")]);
  const at = rows.findIndex((row) => row.includes(cell));
  const column = rows[at].indexOf(cell);
  lines.slice(0, rows.length - at).forEach((texts, i) => {
    texts.slice(0, 3 - column).forEach((text, j) => (rows[at + i][column + j].value = text));
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("input[type=range]").forEach(joinDial);
  draw();
  bringChosen();
  const job = document.querySelector("[data-live]");
  if (job) follow(job);
  document.querySelector(".problem[role=alert]")?.focus();
  document.querySelector(".entry")?.addEventListener("paste", paste);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button);
});
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.target.id === "choice") draw();
  if (event.target.id === "rest") bringChosen();
});
let addressed;
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.target.id !== "dials") return;
  const failed = "The service did not answer. The choice shown is that of an earlier setting.";
  document.getElementById("dials-failed").textContent = event.detail.successful ? "" : failed;
  if (!event.detail.successful) return;
  clearTimeout(addressed); // browsers refuse addresses that change at every move
  addressed = setTimeout(() => history.replaceState(history.state, "", event.detail.pathInfo.finalRequestPath), 250);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", fit);
