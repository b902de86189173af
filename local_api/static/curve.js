// The loss curve of a job, drawn by uPlot (in uplot/) and told in words above it.

import { byId, el, figure } from "./elements.js";

const CURVES = [
  { name: "training loss", field: "train_loss", colour: "--train" },
  { name: "validation loss", field: "valid_loss", colour: "--valid", points: 7 },
  { name: "full validation loss", field: "full_valid_loss", colour: "--full", points: 9 },
];
const HEIGHT = 260; // pixels
const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let chart;

/** Draw the figures of a job's metrics events; without any there is no chart. */
export function drawCurve(metrics) {
  const rows = [...new Map(metrics.map((one) => [one.step, one])).values()].sort((a, b) => a.step - b.step);
  byId("curve").hidden = !rows.length;
  if (!rows.length) return;
  const place = byId("chart");
  chart ??= new uPlot(chartOptions(place.clientWidth), null, place); // once it is visible and has a width
  chart.setData([rows.map((one) => one.step), ...CURVES.map(({ field }) => rows.map((one) => one[field] ?? null))]);
  drawLegend();
}

function chartOptions(width) {
  const axis = { stroke: colour("--dim"), ticks: { show: false } };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, drag: { x: false } },
    scales: { x: { time: false }, y: { range: (_, least, most) => [0, most * 1.05 || 1] } },
    axes: [
      { ...axis, ...named("step"), size: 28, grid: { show: false }, splits: stepsShown,
        incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
      { ...axis, ...named("loss"), size: 44, grid: { stroke: colour("--line"), width: 1 } },
    ],
    series: [{}, ...CURVES.map(({ name, colour: its, points }) => ({
      label: name, stroke: colour(its), width: 2, spanGaps: true,
      points: { show: Boolean(points), size: points, fill: colour(its) },
    }))],
    hooks: { setCursor: [drawLegend] },
  };
}

const named = (label) => ({ label, labelSize: 18, labelFont: "12px system-ui, sans-serif" });

/** Return the steps under the axis: every so many, and the last one in place of any that is too near to it. */
function stepsShown(_, axis, first, last, every) {
  const shown = [];
  for (let step = Math.ceil(first / every) * every; step < last - every / 2; step += every) shown.push(step);
  return [...shown, last];
}

/** Say what the curves show at the cursor or, without one, at the last step; this is also the chart's description. */
function drawLegend() {
  const [steps, ...curves] = chart.data;
  const end = chart.cursor.idx ?? steps.length - 1;
  const parts = CURVES.map(({ name }, index) => {
    const at = curves[index].slice(0, end + 1).findLastIndex((value) => value !== null); // validation is now and then
    return at >= 0 && { name, value: figure(curves[index][at]), curve: index };
  }).filter(Boolean);
  const sentence = `Step ${steps[end]}: ${parts.map((part) => `${part.name} ${part.value}`).join(", ")}`;
  byId("chart").ariaLabel = `Loss curve. ${sentence}`;
  byId("legend").replaceChildren(el("span", {}, `Step ${steps[end]}`), ...parts.map(({ name, value, curve }) =>
    el("span", { className: `curve-${curve}` }, name, " ", el("b", {}, value))));
}

new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width) chart?.setSize({ width: contentRect.width, height: HEIGHT });
}).observe(byId("chart"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart?.redraw());
