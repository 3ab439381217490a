import { $, clock, json, make, say } from "./common.js";
import { chart } from "./chart.js";

const POLL_MS = 3000;
const KEPT_S = 600;  // of the charts, since the page was opened
const GIB = 2 ** 30;

const percent = value => `${Math.round(100 * value)} %`;
const gib = value => `${(value / GIB).toFixed(value < 100 * GIB ? 1 : 0)} GiB`;
const watts = value => `${Math.round(value)} W`;
const celsius = value => `${Math.round(value)} °C`;
const megahertz = value => `${Math.round(value / 1e6)} MHz`;

// By the metric's name in Prometheus, without `finetune_`. most: the end of the scale, or the metric that has it.
const GPU = [
  { label: "Utilisation", metric: "gpu_utilization_ratio", most: 1, text: percent },
  { label: "Power", metric: "gpu_power_watts", most: "gpu_power_limit_watts", text: watts },
  { label: "Temperature", metric: "gpu_temperature_celsius", most: 100, text: celsius },
  { label: "Memory", metric: "gpu_memory_used_bytes", most: "gpu_memory_size_bytes", text: gib },
  { label: "Memory temperature", metric: "gpu_memory_temperature_celsius", most: 110, text: celsius },
  { label: "Fan", metric: "gpu_fan_ratio", most: 1, text: percent },
  { label: "Clock", metric: "gpu_clock_hertz", text: megahertz },
];
// of: a point of the chart, of one GPU by its number. always: as in chart.js.
const GPU_CHARTS = [
  { title: "Utilisation, %", of: (sample, which) => 100 * value(sample, "gpu_utilization_ratio", which), always: [0, 100] },
  { title: "Power, W", of: (sample, which) => value(sample, "gpu_power_watts", which), always: [0] },
  { title: "Temperature, °C", of: (sample, which) => value(sample, "gpu_temperature_celsius", which), always: [20, 90] },
  { title: "Memory in use, GiB", of: (sample, which) => value(sample, "gpu_memory_used_bytes", which) / GIB, always: [0] },
];
const HOST_CHARTS = [
  { title: "CPU in use, %", of: sample => 100 * value(sample, "cpu_utilization_ratio"), always: [0, 100] },
  { title: "Memory in use, GiB", of: sample => memory(sample).used / GIB, always: [0] },
];
const past = [];  // { time, sample }, the newest last
const drawn = {};  // element's id -> what was drawn, as JSON

const value = (sample, metric, which = "") => sample[`finetune_${metric}`]?.[which];

function memory(sample) {
  const size = value(sample, "memory_size_bytes");
  return { size, used: size - value(sample, "memory_available_bytes") };
}

// "208.1 of 252.0 GiB"
const share = (text, part, whole) => `${text(part).split(" ")[0]} of ${text(whole)}`;

// Draws what has changed, and leaves alone what may be selected or have the focus.
function fresh(id, found, draw) {
  const text = JSON.stringify(found);
  if (drawn[id] === text) return;
  drawn[id] = text;
  draw(found);
}

function gauge(label, text, amount, most, high) {
  const shown = [make("dt", { textContent: label }), make("dd", { textContent: text })];
  if (most) {
    const bar = make("meter", { min: 0, max: most, "aria-label": label, "aria-valuetext": text });
    Object.assign(bar, high ? { high, low: high, optimum: 0 } : {});
    bar.value = amount;
    shown.push(make("dd", {}, bar));
  }
  return make("div", {}, ...shown);
}

function gauges(wanted, sample, which, limits) {
  return wanted.map(({ label, metric, most, text }) => {
    const found = value(sample, metric, which), end = typeof most === "string" ? value(sample, most, which) : most;
    if (found === undefined) return gauge(label, "not told");
    return gauge(label, end && end !== most ? share(text, found, end) : text(found), found, end, limits[`finetune_${metric}`]);
  });
}

// How much a count has grown in a second.
function rate(metric) {
  const [before, now] = past.slice(-2);
  const grown = now && value(now.sample, metric) - value(before.sample, metric);
  return Number.isFinite(grown) ? grown / ((now.time - before.time) / 1000) : undefined;
}

function host(sample, limits) {
  const { used, size } = memory(sample), cpu = value(sample, "cpu_utilization_ratio");
  const disks = Object.entries(sample.finetune_disk_size_bytes ?? {}).map(([place, most]) => {
    const full = most - value(sample, "disk_free_bytes", place);
    return gauge(`Disk, ${place}`, share(gib, full, most), full, most);
  });
  const speeds = ["disk_read_bytes_total", "disk_written_bytes_total"].map(metric => ((rate(metric) ?? 0) / 1e6).toFixed(1));
  return [
    gauge("CPU", percent(cpu), cpu, 1),
    ...Object.entries(sample.finetune_cpu_temperature_celsius ?? {}).map(([sensor, found]) =>
      gauge(`CPU temperature (${sensor})`, celsius(found), found, 100, limits.finetune_cpu_temperature_celsius)),
    gauge("Memory", share(gib, used, size), used, size),
    gauge("Swap", gib(value(sample, "swap_used_bytes"))),
    ...disks,
    gauge("Disks, read and write", `${speeds.join(" and ")} MB/s`),
  ];
}

function charts(place, wanted, which) {
  const words = { where: at => (at ? `, ${-at} s ago` : ", now"), tick: at => `${at} s` };
  const made = wanted.map(each => ({ ...each, ...chart(each.title, { ...each, ...words }) }));
  place.append(...made.map(each => each.made));
  return () => {
    const now = past.at(-1).time;
    for (const { of, show } of made) {
      const points = past.map(({ time, sample }) => [Math.round((time - now) / 1000), of(sample, which)]);
      show([{ label: "", name: "a", points: points.filter(point => Number.isFinite(point[1])) }]);
    }
  };
}

const gpuParts = [];  // of each GPU: its gauges, its note, and what draws its charts
const drawHost = charts($("host-charts"), HOST_CHARTS);

function gpuPart(number) {
  const title = make("h2", { id: `gpu-${number}` }), note = make("span", { className: "state", hidden: true });
  const list = make("dl", { className: "gauges" }), place = make("div", { className: "charts" });
  const made = make("section", { className: "stack", "aria-labelledby": title.id }, make("div", { className: "row" }, title, note), list, place);
  $("gpus").append(made);
  return { made, title, note, list, draw: charts(place, GPU_CHARTS, String(number)) };
}

function showGpus({ gpus, sample, limits, no_gpu: why }) {
  $("no-gpu").hidden = !why;
  $("no-gpu").textContent = `No GPU here (${why}): everything runs on the CPU.`;
  gpuParts.forEach(({ made }, number) => { made.hidden = number >= gpus.length; });
  gpus.forEach(({ name }, number) => {
    gpuParts[number] ??= gpuPart(number);
    const { title, note, list, draw } = gpuParts[number], told = metric => value(sample, metric, String(number));
    title.textContent = `GPU ${number}: ${name ?? "of unknown name"}`;
    note.textContent = told("gpu_lost") ? "does not answer" : told("gpu_throttled") ? "slowed down by heat or hardware" : told("gpu_power_capped") ? "at its power limit" : "";
    note.hidden = !note.textContent;
    list.replaceChildren(...gauges(GPU, sample, String(number), limits));
    draw();
  });
}

// What is bad shows its cure at once, the others when they are opened.
function finding({ id, verdict, fact, limit, source, cost, cure }) {
  const said = { "should be": limit && source ? `${limit} (${source})` : limit, "what it costs": cost, "what to do": cure };
  const rows = Object.entries(said).filter(([, text]) => text).flatMap(([name, text]) =>
    [make("dt", { textContent: name }), make("dd", { textContent: text, className: name === "what to do" ? "cure" : "" })]);
  return make("li", {}, make("details", { open: verdict === "bad" },
    make("summary", {}, make("span", { className: `state ${verdict}`, textContent: verdict }), make("strong", { textContent: ` ${id} ` }), fact),
    make("dl", { className: "note" }, ...rows)));
}

function showHealth({ time, checks, findings }) {
  if (!time) return;
  const serious = findings.filter(each => each.verdict !== "unknown"), untold = findings.filter(each => each.verdict === "unknown");
  $("checked").textContent = `${checks - findings.length} of ${checks} checks are fine (${clock(time * 1000)})`;
  $("findings").replaceChildren(...serious.map(finding));
  $("findings").hidden = !serious.length;
  $("untold").hidden = !untold.length;
  $("untold").querySelector("summary").textContent = `${untold.length} can't be told here`;
  $("untold").querySelector("ul").replaceChildren(...untold.map(({ id, fact }) => make("li", { textContent: `${id}: ${fact}` })));
}

function showJobs({ runs, gpus }) {
  const focused = document.activeElement?.getAttribute("href");
  const programs = gpus.flatMap(({ programs: found }, number) => found.map(each => ({ ...each, number })));
  const row = (what, where, how) => make("tr", {}, make("th", { scope: "row" }, what), make("td", {}, where), make("td", {}, how));
  const rows = [
    ...runs.map(run => row(make("a", { href: `runs#${new URLSearchParams({ run: run.name })}`, textContent: `run ${run.name}` }), "running", `step ${run.step} of ${run.steps ?? "?"}`)),
    ...programs.map(each => row(`${each.own ? "this server" : each.name ?? "a program"} (${each.pid})`, `GPU ${each.number}`, each.mib === null ? "memory not told" : `${each.mib} MiB`)),
  ];
  $("no-jobs").hidden = runs.length > 0;
  $("jobs").hidden = !rows.length;
  $("jobs").replaceChildren(make("table", {}, make("tbody", {}, ...rows)));
  if (focused) $("jobs").querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

let timer = null;

async function update() {
  clearTimeout(timer);
  try {
    const found = await json("api/machine");
    const time = Date.now();
    past.push({ time, sample: found.sample });
    while (time - past[0].time > KEPT_S * 1000) past.shift();
    fresh("health", found.health, showHealth);
    fresh("jobs", { runs: found.runs, gpus: found.gpus }, showJobs);
    showGpus(found);
    $("host").replaceChildren(...host(found.sample, found.limits));
    drawHost();
    say($("status"), "");
  } catch (error) { say($("status"), error.message, true); }
  if (!document.hidden) timer = setTimeout(update, POLL_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
update();
