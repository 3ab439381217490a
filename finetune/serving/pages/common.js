// What all pages share: elements, requests to this server, and its streams of events.

export const $ = id => document.getElementById(id);

// Texts are never taken as markup: what a model writes is not to be trusted.
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function button(label, act, properties = {}) {
  const made = make("button", { type: "button", textContent: label, ...properties });
  made.addEventListener("click", act);
  return made;
}

async function failure(answer) {
  try { return new Error((await answer.json()).error.message); }
  catch { return new Error(`the server answered ${answer.status}`); }
}

export async function ask(path, body, signal) {
  const asked = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try { answer = await fetch(path, { ...asked, signal }); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server can't be reached");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

export const json = async path => (await ask(path)).json();

export async function* events(path, body, signal) {
  const answer = await ask(path, { ...body, stream: true }, signal);
  const warning = answer.headers.get("x-finetune-warning");
  if (warning) yield { warning };
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") continue;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

export async function models() {
  return (await json("v1/models")).data.map(model => model.id);
}

export function fill(select, names) {
  select.replaceChildren(...names.map(name => make("option", { textContent: name })));
}

export const number = input => (input.value === "" ? null : Number(input.value));

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

export const clock = ms => new Date(ms).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

export const aborted = error => error.name === "AbortError";

// What changes on the screen is also said to those who can't see it.
export function say(place, text, isError = false) {
  place.textContent = text;
  place.classList.toggle("error", isError);
}
