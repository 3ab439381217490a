import { $, aborted, button, clock, events, fill, make, models, number, randomSeed, say } from "./common.js";

// Kept in localStorage: chats are text, and a few MB hold hundreds of them.
const KEPT = "finetune.chats", MOST = 100;
let chats = stored();  // {id, at, turns: [{prompt, seed, replies: {model: {text, error}}}]}, the newest first
let chat = blank();
let running = null;
let editing = null;  // index of the turn whose question is being edited

function stored() {
  try { return JSON.parse(localStorage.getItem(KEPT)) ?? []; }
  catch { return []; }
}

function blank() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), at: Date.now(), turns: [] };
}

function keep() {
  chat.at = Date.now();
  chats = [chat, ...chats.filter(each => each.id !== chat.id)].slice(0, MOST);
  save();
}

function save() {
  for (;;) {
    try { localStorage.setItem(KEPT, JSON.stringify(chats)); break; }
    catch (error) {
      if (chats.length < 2) { say($("status"), `This chat can't be kept in the browser (${error.message}).`, true); break; }
      chats.pop();  // the store is full: the oldest goes
    }
  }
  showChats();
}

function showChats() {
  $("chats").replaceChildren(...chats.map(each => {
    const title = each.turns[0]?.prompt ?? "empty";
    const open = button(title, () => openChat(each), { title: `${title}\n${clock(each.at)}` });
    if (each.id === chat.id) open.setAttribute("aria-current", "true");
    const remove = button("×", () => {
      chats = chats.filter(other => other.id !== each.id);
      save();
      if (each.id === chat.id) openChat(blank());
    }, { className: "quiet", "aria-label": `Delete the chat: ${title}` });
    return make("li", {}, open, remove);
  }));
  $("forget").hidden = !chats.length;
}

function openChat(opened) {
  running?.abort();
  chat = opened;
  stopEditing();
  show();
  showChats();
  $("prompt").focus();
}

// What a model is sent: of each earlier turn its own reply, or else the one that was given.
function messages(model, turns, prompt) {
  const said = turns.flatMap(turn => {
    const reply = turn.replies[model] ?? Object.values(turn.replies)[0];
    return reply?.text ? [{ role: "user", content: turn.prompt }, { role: "assistant", content: reply.text }] : [];
  });
  return [...said, { role: "user", content: prompt }];
}

function show() {
  $("log").replaceChildren(...chat.turns.map(showTurn));
  if (!chat.turns.length) $("log").append(make("p", { className: "note", textContent: "Ask something. With “Beside the base” both models reply to the same message with the same seed." }));
  $("log").scrollTop = $("log").scrollHeight;
}

function showTurn(turn, index) {
  const isLast = index === chat.turns.length - 1;
  const replies = make("div", { className: "replies" }, ...Object.entries(turn.replies).map(([model, reply]) => showReply(model, reply)));
  const actions = make("div", { className: "row" }, make("span", { className: "note", textContent: `seed ${turn.seed}` }),
    button("Edit", () => edit(index), { className: "quiet", "aria-label": `Edit: ${turn.prompt}` }));
  if (isLast) actions.append(button("Retry", retry, { className: "quiet", title: "The same message with another seed" }));
  return make("article", { className: "turn" }, make("p", { className: "asked", textContent: turn.prompt }), replies, actions);
}

function showReply(model, reply) {
  const text = make("p", { textContent: reply.text });
  const box = make("div", {}, make("span", { className: "note", textContent: model }), text);
  if (reply.error) box.append(make("p", { className: "error", textContent: reply.error }));
  if (reply.stopped) box.append(make("p", { className: "note", textContent: "stopped" }));
  reply.place = () => text;
  return box;
}

// turn: the last of the chat. Its replies are written as they come.
async function answer(turn, names) {
  const before = chat.turns.slice(0, -1), log = $("log"), own = chat;
  turn.replies = Object.fromEntries(names.map(name => [name, { text: "" }]));
  running = new AbortController();
  const { signal } = running;
  $("send").disabled = true;
  $("stop").disabled = false;
  log.setAttribute("aria-busy", "true");
  say($("status"), "Writing …");
  show();
  await Promise.all(Object.entries(turn.replies).map(async ([model, reply]) => {
    try {
      for await (const event of events("v1/chat/completions", { model, messages: messages(model, before, turn.prompt), seed: turn.seed }, signal)) {
        const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        reply.text += event.choices?.[0]?.delta.content ?? "";
        reply.place().textContent = reply.text;
        if (follows) log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      if (aborted(error)) reply.stopped = true;
      else reply.error = error.message;
    }
  }));
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  log.removeAttribute("aria-busy");
  say($("status"), "");
  if (own === chat) { keep(); show(); }
}

const chosen = () => ($("beside").checked && $("model").value !== "base" ? ["base", $("model").value] : [$("model").value]);

function send(event) {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  if (editing !== null) chat = { ...blank(), turns: chat.turns.slice(0, editing).map(plain) };
  stopEditing();
  $("prompt").value = "";
  const turn = { prompt, seed: number($("seed")) ?? randomSeed(), replies: {} };
  chat.turns.push(turn);
  answer(turn, chosen());
}

const plain = turn => JSON.parse(JSON.stringify(turn));

function retry() {
  if (running) return;
  const turn = chat.turns.at(-1);
  turn.seed = number($("seed")) ?? randomSeed();
  answer(turn, chosen());
}

// An edited question begins a chat of its own; the one before stays as it was.
function edit(index) {
  if (running) return;
  editing = index;
  $("prompt").value = chat.turns[index].prompt;
  $("prompt").focus();
  $("status").replaceChildren("Editing: what follows this message starts again, in a new chat. ", button("Cancel", () => {
    stopEditing();
    $("prompt").value = "";
    $("prompt").focus();
  }, { className: "quiet" }));
}

function stopEditing() {
  editing = null;
  say($("status"), "");
}

$("form").addEventListener("submit", send);
$("prompt").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => openChat(blank()));
$("forget").addEventListener("click", () => {
  if (!confirm("Delete all chats that this browser keeps?")) return;
  chats = [];
  save();
  openChat(blank());
});

(async () => {
  if (matchMedia("(max-width: 46rem)").matches) $("earlier").open = false;
  show();
  showChats();
  try {
    const names = await models();
    fill($("model"), names);
    $("both").hidden = names.length === 1;
  } catch (error) { say($("status"), error.message, true); }
})();
