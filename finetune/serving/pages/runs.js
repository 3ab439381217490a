import { $, clock, json, make, say } from "./common.js";
import { chart } from "./chart.js";

const POLL_MS = { running: 2000, idle: 10000 };
const SAMPLES_MS = 10000;  // between questions for the samples of a run that trains; images are large
const CHARTS = [
  { title: "Training loss", tag: "loss/smoothed", faint: "loss/step" },
  { title: "Validation loss", tag: "validation/mean" },
  { title: "Perplexity", tag: "validation/perplexity", log: true, kind: "language" },
  { title: "Learning rate", tag: "train/learning_rate" },
  { title: "Gradient norm", tag: "train/gradient_norm" },
  { title: "Images per second", tag: "train/images_per_s", kind: "diffusion" },
  { title: "Tokens per second", tag: "train/tokens_per_s", kind: "language" },
  { title: "Memory, GiB", tag: "system/memory_gib" },
].map(each => ({ ...each, ...chart(each.title, each) }));

let timer = null;
let told = {};  // what was shown of the run, so that only what is new is asked for

const chosen = () => {
  const found = new URLSearchParams(location.hash.slice(1));
  return { name: found.get("run"), other: found.get("with") };
};

const link = (name, other) => `#${new URLSearchParams({ run: name, ...(other ? { with: other } : {}) })}`;

const path = (name, what) => `api/runs/${encodeURIComponent(name)}/${what}`;

const short = value => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));

const progress = run => (run.steps && run.step < run.steps ? `${run.step} of ${run.steps} steps` : `${run.step ?? 0} ${run.step === 1 ? "step" : "steps"}`);

function describe(run) {
  if (run.problem) return run.problem;
  const kind = { diffusion: "images", language: "chat" }[run.kind] ?? run.kind;
  return `${kind} · ${progress(run)} · loss ${short(run.loss)}`;
}

function showList(runs, name) {
  const focused = document.activeElement?.dataset?.run;
  $("list").replaceChildren(...runs.map(run => {
    const made = make("a", { href: link(run.name) },
      make("span", { className: "row" }, make("strong", { textContent: run.name }), make("span", { className: `state ${run.state}`, textContent: run.state })),
      make("span", { className: "note", textContent: describe(run) }));
    made.dataset.run = run.name;
    if (run.name === name) made.setAttribute("aria-current", "true");
    return made;
  }));
  if (focused) $("list").querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

function showRun(run, runs, other) {
  $("name").textContent = run.name;
  $("state").textContent = run.state;
  $("state").className = `state ${run.state}`;
  const facts = { trained: progress(run), loss: short(run.loss), "best validation": short(run.validation), base: run.base, rank: run.rank, changed: clock(run.changed * 1000) };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value ?? "").map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  $("slow").replaceChildren(...(run.slow ?? []).map(textContent => make("li", { textContent })));
  $("progress").classList.toggle("kept", run.state !== "running");
  $("progress").max = run.steps || 1;
  $("progress").value = Math.min(run.step ?? 0, run.steps || 1);
  const names = ["", ...runs.map(each => each.name).filter(each => each !== run.name)];
  const options = names.map(name => make("option", { value: name, textContent: name || "no other run", selected: name === (other ?? "") }));
  if ($("with").textContent !== options.map(option => option.textContent).join("")) $("with").replaceChildren(...options);
  $("with").value = other ?? "";
}

function showCurves(parts) {
  const { kind, state } = parts[0].run;
  for (const each of CHARTS) {
    const lines = parts.map(({ run, curves }, index) => ({ label: run.name, name: "ab"[index], points: curves[each.tag] ?? [] }));
    if (parts.length === 1 && each.faint) lines.push({ label: "", name: "a", points: parts[0].curves[each.faint] ?? [], faint: true });
    each.show(lines);
    // Of a run that trains, charts have their place before they have points: nothing jumps when these come.
    if (state === "running" && (each.kind ?? kind) === kind) each.made.hidden = false;
  }
  $("no-curves").hidden = CHARTS.some(each => !each.made.hidden);
  $("legend").replaceChildren(...(parts.length > 1 ? parts.map(({ run }, index) => make("span", {}, make("i", { className: "ab"[index] }), `${run.name} `)) : []));
}

const image = (source, described) => (source ? make("img", { src: source, alt: described }) : make("em", { textContent: "can't be shown" }));

// TensorBoard's texts are Markdown, of which ours use one mark.
const strong = text => text.split("**").map((part, index) => (index % 2 ? make("strong", { textContent: part }) : part));

function show(id, filled) {
  $(id).closest("section").hidden = !filled;
}

// The three below ask first, and return what shows the answer: all of them are shown at once, so that nothing jumps.

async function askPreviews(name) {
  const { items } = await json(path(name, "previews"));
  return () => showPreviews(items);
}

function showPreviews(items) {
  const steps = [...new Set(items.map(item => item.step))], prompts = [...new Set(items.map(item => item.prompt))];
  const head = make("tr", {}, make("th", { textContent: "prompt" }), ...steps.map(step => make("th", { scope: "col", textContent: `step ${step}` })));
  const rows = prompts.map(prompt => make("tr", {}, make("th", { scope: "row", textContent: prompt }), ...steps.map(step => {
    const found = items.find(item => item.prompt === prompt && item.step === step);
    if (!found) return make("td");
    return found.text === null ? make("td", {}, image(found.image, `${prompt}, step ${step}`)) : make("td", { className: "text" }, ...strong(found.text));
  })));
  $("previews").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  show("previews", items.length);
}

async function askSamples(name) {
  const { items, kind } = await json(path(name, "samples"));
  return () => showSamples(items, kind);
}

function showSamples(items, kind) {
  const half = (item, side) => (kind === "images" ? image(item[side], `${side}: ${item.prompt}, seed ${item.seed}`) : make("p", { className: "answer", textContent: item[side] }));
  $("samples").className = kind === "images" ? "tiles wide" : "stack";
  $("samples").replaceChildren(...items.map(item => make("figure", { className: "pair" },
    make("figcaption", { textContent: `${item.prompt} (seed ${item.seed})` }), half(item, "base"), half(item, "tuned"))));
  show("samples", items.length);
}

async function askCaptions(name, first = 0) {
  const { total, items } = await json(path(name, `captions?first=${first}`));
  return () => showCaptions(items, total, first);
}

function showCaptions(items, total, first) {
  if (!first) $("captions").replaceChildren();
  $("captions").append(...items.map(item => make("figure", {},
    ...(item.image ? [make("img", { src: item.image, alt: item.file, loading: "lazy" })] : []),
    make("figcaption", {}, item.text, make("div", { className: "note", textContent: `${item.file}, ${item.source === "user" ? "by you" : item.source}` })))));
  $("captions").shown = first + items.length;
  $("more").hidden = $("captions").shown >= total;
  $("captions-title").textContent = `Captions (${total})`;
  show("captions", total);
}

async function update() {
  clearTimeout(timer);
  let wait = POLL_MS.idle;
  try {
    const { runs } = await json("api/runs");
    const { name: wanted, other } = chosen();
    const name = wanted ?? runs[0]?.name;
    showList(runs, name);
    $("run").hidden = !name;
    if (!name) say($("status"), "There are no runs beside this recipe's run folder yet.");
    if (name) {
      const parts = await Promise.all([name, ...(other ? [other] : [])].map(each => json(path(each, "curves"))));
      showRun(parts[0].run, runs, other);
      showCurves(parts);
      if (parts.some(part => part.run.state === "running")) wait = POLL_MS.running;
      const { changed, state } = parts[0].run, before = told;
      const isOther = before.name !== name, isNew = isOther || before.state !== state;
      const again = changed !== before.changed && Date.now() - (before.sampled ?? 0) > SAMPLES_MS;
      told = { name, state, changed: isNew || again ? changed : before.changed, sampled: isNew || again ? Date.now() : before.sampled };
      const answers = await Promise.all([
        ...(isNew || again ? [askPreviews(name)] : []),
        ...(isNew ? [askSamples(name), askCaptions(name)] : []),
      ]);
      answers.forEach(showAnswer => showAnswer());
      say($("status"), "");
    }
  } catch (error) { say($("status"), error.message, true); }
  if (!document.hidden) timer = setTimeout(update, wait);
}

$("charts").append(...CHARTS.map(each => each.made));
$("with").addEventListener("change", () => { location.hash = link(told.name, $("with").value); });
$("more").addEventListener("click", async () => {
  try { (await askCaptions(told.name, $("captions").shown))(); }
  catch (error) { say($("status"), error.message, true); }
});
window.addEventListener("hashchange", update);
document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
update();
