import { $, aborted, button, clock, events, fill, json, make, models, number, randomSeed, say } from "./common.js";
import * as gallery from "./gallery.js";

const FACTS = ["prompt", "negative prompt", "model", "content", "seed", "steps", "guidance", "size"];
const empty = $("empty");
const warnings = new Set();  // of the jobs under way
let running = null;
let shown = [];  // ids of the items on the stage
const urls = new Map();  // of items, by id

const urlOf = item => {
  if (!urls.has(item.id)) urls.set(item.id, URL.createObjectURL(item.file));
  return urls.get(item.id);
};

const described = item => `${item.facts.model}: ${item.facts.prompt}, seed ${item.facts.seed}`;

function form() {
  const body = { prompt: $("prompt").value.trim(), seed: number($("seed")) ?? randomSeed() };
  for (const name of ["steps", "guidance"]) if (number($(name)) !== null) body[name] = number($(name));
  if ($("size").value) body.size = $("size").value;
  body.negative_prompt = $("negative").value;
  return body;
}

// One image, drawn and kept. after: of each step, with the share that is done.
async function drawOne(body, after) {
  let drawn = null;
  for await (const news of events("v1/images/generations", body, running.signal)) {
    if (news.warning) warnings.add(news.warning);
    if (news.type === "image_generation.progress") after(news.step / news.steps, `step ${news.step} of ${news.steps}`);
    if (news.type === "image_generation.completed") drawn = news;
  }
  if (!drawn) throw new Error("the server ended without an image");
  const file = new Blob([Uint8Array.from(atob(drawn.b64_json), char => char.charCodeAt(0))], { type: "image/png" });
  const facts = {
    prompt: body.prompt, "negative prompt": drawn.negative_prompt, model: drawn.model, content: drawn.content,
    seed: drawn.seed, steps: drawn.steps, guidance: drawn.guidance, size: drawn.size,
  };
  const item = { file, facts, at: Date.now() };
  try { await gallery.keep(item); }
  catch { item.id = `not kept ${item.at}`; }  // the gallery says why; the image is shown and can be saved
  return item;
}

// Jobs one after another, with one progress bar and one button that cancels. done: after each.
async function work(jobs, done) {
  running = new AbortController();
  const buttons = [$("draw"), $("sheet-draw")];
  buttons.forEach(each => { each.disabled = true; });
  $("stop").disabled = false;
  warnings.clear();
  say($("status"), "Waiting for the server …");
  try {
    for (const [index, job] of jobs.entries()) {
      const place = jobs.length > 1 ? `image ${index + 1} of ${jobs.length}, ` : "";
      done(await drawOne(job, (share, text) => {
        $("progress").value = (index + share) / jobs.length;
        say($("status"), `Drawing: ${place}${text}`);
      }), index);
    }
    say($("status"), ["Done", ...warnings].join(", but ") + ".");
  } catch (error) {
    say($("status"), aborted(error) ? "Cancelled." : error.message, !aborted(error));
  }
  running = null;
  buttons.forEach(each => { each.disabled = false; });
  $("stop").disabled = true;
  $("progress").value = 0;
  await showGallery();
}

async function draw(event) {
  event.preventDefault();
  if (running) return;
  const body = form(), chosen = $("model").value;
  const names = $("beside").checked && chosen !== "base" ? ["base", chosen] : [chosen];
  const drawn = [];
  await work(names.map(model => ({ ...body, model })), item => {
    drawn.push(item);
    show(drawn);
    $("stage").scrollIntoView({ block: "nearest" });
  });
}

// One image, or the base's with a tuned one above it that a slider uncovers.
function show(items) {
  shown = items.map(item => item.id);
  const last = items.at(-1), facts = last.facts;
  const [width, height] = facts.size.split("x").map(Number);
  const images = items.map(item => make("img", { src: urlOf(item), alt: described(item), width, height }));
  const box = make("div", { className: items.length > 1 ? "compare" : "compare one" }, ...images);
  if (items.length > 1) {
    const slider = make("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `Base to the left, ${facts.model} to the right` });
    slider.addEventListener("input", () => box.style.setProperty("--at", `${slider.value}%`));
    box.append(
      make("span", { className: "left", textContent: items[0].facts.model }),
      make("span", { className: "right", textContent: facts.model }), slider,
    );
  }
  const list = make("dl");
  for (const name of FACTS.filter(each => facts[each] !== "")) {
    const text = name === "content" ? facts[name].replace(/\b([0-9a-f]{12})[0-9a-f]+/g, "$1…") : facts[name];
    list.append(make("dt", { textContent: name }), make("dd", { textContent: text, title: facts[name] }));
  }
  const actions = make("div", { className: "row" }, button("Use these settings", () => take(facts)));
  for (const item of items) {
    const name = item.facts.model.replace(/[^\w.-]+/g, "-");
    actions.append(make("a", { href: urlOf(item), download: `${name}-seed${item.facts.seed}.png`, textContent: `Save ${item.facts.model}` }));
  }
  actions.append(button(items.length > 1 ? "Delete both" : "Delete", () => drop(items)));
  $("stage").replaceChildren(box, make("div", { className: "stack" }, list, actions));
  markShown();
}

function take(facts) {
  for (const name of ["prompt", "seed", "steps", "guidance", "size"]) $(name).value = facts[name];
  $("negative").value = facts["negative prompt"];
  if ([...$("model").options].some(option => option.value === facts.model)) $("model").value = facts.model;
  $("prompt").focus();
}

async function drop(items) {
  for (const item of items) if (typeof item.id === "number") await gallery.remove(item.id);
  $("stage").replaceChildren(empty);
  shown = [];
  await showGallery();
  $("prompt").focus();
}

const key = item => JSON.stringify([item.facts.prompt, item.facts["negative prompt"], item.facts.seed, item.facts.steps, item.facts.guidance, item.facts.size]);

async function showGallery() {
  let items = [];
  try { items = await gallery.all(); }
  catch (error) { say($("kept"), `This browser keeps no images (${error.message}). Save those that you want.`, true); }
  $("gallery").replaceChildren(...items.map(item => {
    const made = button("", () => {
      const base = items.find(other => other.facts.model === "base" && key(other) === key(item));
      show(base && item !== base ? [base, item] : [item]);
      $("stage").scrollIntoView({ block: "nearest" });
    }, { title: `${described(item)}\n${clock(item.at)}` });
    made.dataset.id = item.id;
    made.append(
      make("img", { src: urlOf(item), alt: described(item), loading: "lazy" }),
      make("span", { className: "note", textContent: item.facts.model }),
    );
    return make("li", {}, made);
  }));
  $("forget").hidden = !items.length;
  markShown();
}

function markShown() {
  for (const each of $("gallery").querySelectorAll("button")) each.setAttribute("aria-pressed", shown.includes(Number(each.dataset.id)));
}

async function drawSheet() {
  const prompts = [$("prompt").value, ...$("prompts").value.split("\n")].map(text => text.trim()).filter(Boolean);
  const names = [...$("columns").querySelectorAll("input:checked")].map(input => input.value);
  if (running || !prompts.length || !names.length) {
    say($("status"), "Write a prompt and choose a model.", true);
    return;
  }
  const body = form(), cells = [];
  const rows = prompts.map(prompt => {
    const row = make("tr", {}, make("th", { scope: "row", textContent: prompt }));
    for (const model of names) cells.push({ job: { ...body, prompt, model }, cell: row.appendChild(make("td", {}, make("img", { alt: "" }))) });
    return row;
  });
  const head = make("tr", {}, make("th", { textContent: `seed ${body.seed}` }), ...names.map(name => make("th", { scope: "col", textContent: name })));
  $("sheet").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  $("sheet").hidden = false;
  await work(cells.map(cell => cell.job), (item, index) => {
    cells[index].cell.replaceChildren(make("img", { src: urlOf(item), alt: described(item) }));
  });
}

$("form").addEventListener("submit", draw);
$("sheet-draw").addEventListener("click", drawSheet);
$("stop").addEventListener("click", () => running?.abort());
$("forget").addEventListener("click", async () => {
  if (!confirm("Delete all images that this browser keeps?")) return;
  await gallery.clear();
  $("stage").replaceChildren(empty);
  await showGallery();
});

(async () => {
  try {
    const [names, settings] = await Promise.all([models(), json("api/image_settings")]);
    fill($("model"), names);
    $("both").hidden = names.length === 1;
    for (const name of ["prompt", "steps", "guidance", "size"]) $(name).value = settings[name];
    $("negative").value = settings.negative_prompt;
    $("columns").replaceChildren(...names.map(name => make("label", { className: "check" },
      make("input", { type: "checkbox", value: name, checked: true }), name)));
    await showGallery();
  } catch (error) { say($("status"), error.message, true); }
})();
