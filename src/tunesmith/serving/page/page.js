"use strict";
// Everything that comes from the server is put into the page as text (textContent), never as HTML.

const CARDS_AT_A_TIME = 24;

let apiKey = null; // in this page's memory alone
let models = [];
let cardsShown = CARDS_AT_A_TIME;
let undrawn = []; // models whose cards are not there yet
let drawing = 0; // number of the latest drawing of the cards; earlier ones stop
let running = null; // AbortController of the answers that run

const byId = (id) => document.getElementById(id);
const selects = [...document.querySelectorAll("select[name=model]")];

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// ---- The server

class Fault extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " ").trim());
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey !== null) headers.Authorization = `Bearer ${apiKey}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The server cannot be reached; is it running?");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  if (reply.status === 401) byId("key-form").hidden = false;
  throw new Fault(told?.error?.message ?? `The server answered with status ${reply.status}`, reply.status);
}

function show(place, error) {
  place.textContent = error ? error.message : "";
  place.hidden = !error;
}

// Data of server-sent events, see https://html.spec.whatwg.org/multipage/server-sent-events.html
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

// ---- Models to choose from

async function loadModels() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    models = [];
    // The first time that a key is missing, being asked for it says enough.
    show(byId("fault"), error.status === 401 && apiKey === null ? null : error);
    if (error.status === 401) byId("key").focus();
    drawCards();
    byId("run").disabled = true;
    return;
  }
  byId("key-form").hidden = true;
  show(byId("fault"), null);
  offerModels();
  drawCards();
  byId("run").disabled = running !== null || models.length === 0;
}

function offerModels() {
  const ids = models.map((model) => model.id);
  const isFirst = selects[0].options.length === 0;
  selects.forEach((select, place) => {
    const before = isFirst ? (ids[place] ?? "") : select.value;
    select.replaceChildren();
    if (place > 0) select.append(new Option("none", ""));
    const bases = models.filter((model) => model.parent === null);
    for (const base of bases) select.append(new Option(base.id, base.id));
    for (const base of bases) {
      const group = element("optgroup");
      group.label = `Adapters of ${base.id}`;
      for (const model of models) {
        // Its beginning, the same for all of them, would hide what tells them apart in a narrow list.
        const short = model.id.startsWith(`${base.id}:`) ? model.id.slice(base.id.length + 1) : model.id;
        if (model.parent === base.id) group.append(new Option(short, model.id));
      }
      if (group.children.length) select.append(group);
    }
    select.value = ids.includes(before) ? before : place > 0 ? "" : (ids[0] ?? "");
  });
}

// ---- Answers

function answerBox(model) {
  const box = element("article", "", "answer");
  const parts = {
    box,
    text: element("pre"),
    fault: element("p", "", "fault"),
    numbers: element("p", "waiting for the first token", "numbers faint"),
  };
  parts.fault.hidden = true;
  parts.fault.setAttribute("role", "alert");
  parts.numbers.setAttribute("role", "status");
  box.setAttribute("aria-busy", "true");
  box.append(element("h3", model), parts.text, parts.fault, parts.numbers);
  return parts;
}

function requestBody(model) {
  const messages = [{ role: "user", content: byId("prompt").value }];
  if (byId("system").value.trim()) messages.unshift({ role: "system", content: byId("system").value });
  const body = {
    model,
    messages,
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (byId("seed").value !== "") body.seed = Number(byId("seed").value);
  return JSON.stringify(body);
}

async function answer(parts, body, signal) {
  const clock = { began: performance.now(), first: null, last: null, pieces: 0, tokens: null, finish: null };
  try {
    await stream(parts, body, signal, clock);
    parts.numbers.textContent = numbersOf(clock);
  } catch (error) {
    const isStopped = error.name === "AbortError";
    if (!isStopped) show(parts.fault, error);
    parts.numbers.textContent = clock.first === null ? "" : numbersOf(clock);
    if (isStopped) parts.numbers.textContent = `stopped. ${parts.numbers.textContent}`.trim();
  }
  parts.box.setAttribute("aria-busy", "false");
}

async function stream(parts, body, signal, clock) {
  const reply = await ask("/v1/chat/completions", { method: "POST", body, signal });
  for await (const data of eventsOf(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Fault(chunk.error.message);
    if (chunk.usage) clock.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) continue;
    clock.last = performance.now(); // a stop token has no text, but is a token
    if (choice.finish_reason) clock.finish = choice.finish_reason;
    if (!choice.delta.content) continue;
    clock.pieces += 1;
    clock.first ??= clock.last;
    parts.numbers.textContent = numbersOf(clock);
    parts.text.append(choice.delta.content); // a string becomes a text node
  }
  throw new Fault("The connection ended before the answer did");
}

function firstToken(clock) {
  const milliseconds = clock.first - clock.began;
  const shown = milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
  return `first token after ${shown}`;
}

// The speed is that after the first token. Without the server's count, each piece is taken for one token.
function numbersOf(clock) {
  if (clock.first === null) return "an empty answer";
  const tokens = clock.tokens ?? clock.pieces;
  const about = clock.tokens === null ? "about " : "";
  const seconds = (clock.last - clock.began) / 1000;
  const later = (clock.last - clock.first) / 1000;
  const parts = [firstToken(clock), `${about}${tokens} token${tokens === 1 ? "" : "s"} in ${seconds.toFixed(1)} s`];
  if (tokens > 1 && later > 0) parts.push(`${about}${((tokens - 1) / later).toFixed(1)} tokens/s`);
  if (clock.finish === "length") parts.push("cut off at max tokens");
  return parts.join(" · ");
}

async function run(event) {
  event.preventDefault();
  if (running !== null) return;
  const chosen = [...new Set(selects.map((select) => select.value).filter(Boolean))];
  const signal = (running = new AbortController()).signal;
  byId("run").disabled = true;
  byId("stop").disabled = false;
  const boxes = chosen.map(answerBox);
  byId("answers").replaceChildren(...boxes.map((parts) => parts.box));
  await Promise.all(boxes.map((parts, place) => answer(parts, requestBody(chosen[place]), signal)));
  running = null;
  byId("run").disabled = models.length === 0;
  byId("stop").disabled = true;
}

// ---- Adapters

// Full-parameter checkpoints have cards too; bases of the command line have none, which only the server knows.
function drawCards() {
  const adapters = models.filter((model) => model.parent !== null);
  byId("count").textContent = `${adapters.length} ${adapters.length === 1 ? "adapter" : "adapters"}`;
  byId("cards").replaceChildren();
  drawing += 1;
  undrawn = [...adapters, ...models.filter((model) => model.parent === null)];
  return addCards(cardsShown);
}

// Until so many more cards are there. "Show more" appears when they are, and only if there is a card to show.
async function addCards(room) {
  const mine = drawing;
  byId("more").hidden = true;
  const boxes = new Map();
  for (const model of undrawn.slice(0, room).filter((model) => model.parent !== null)) {
    const box = byId("cards").appendChild(cardBox(model));
    box.append(element("p", "…", "faint"));
    boxes.set(model, box);
  }
  let first = null;
  while (undrawn.length && (room > 0 || undrawn[0].parent === null)) {
    const model = undrawn[0];
    const parts = await partsOf(model);
    if (mine !== drawing) return null;
    if (parts && room === 0) break;
    undrawn.shift();
    if (!parts) continue;
    const box = boxes.get(model) ?? byId("cards").appendChild(cardBox(model));
    box.replaceChildren(element("h3", model.id), ...parts);
    first ??= box;
    room -= 1;
  }
  byId("more").hidden = undrawn.length === 0;
  return first;
}

function cardBox(model) {
  const box = element("article", "", "card");
  box.append(element("h3", model.id));
  return box;
}

// What the card of a model says; null where it has none.
async function partsOf(model) {
  try {
    const path = model.id.split("/").map(encodeURIComponent).join("/");
    const { card } = await (await ask(`/v1/models/${path}`)).json();
    return card || model.parent !== null ? cardParts(card ?? {}, model) : null;
  } catch (error) {
    return [element("p", error.message, "fault")];
  }
}

async function showMore() {
  cardsShown += CARDS_AT_A_TIME;
  const first = await addCards(CARDS_AT_A_TIME);
  if (!first) return;
  first.tabIndex = -1; // the button that had the focus may be gone
  first.focus({ preventScroll: true });
}

function cardParts(card, model) {
  const parts = [];
  if (card.run) parts.push(lineageOf(card, model), element("p", factsOf(card), "faint"));
  if (card.before || card.after) parts.push(scoresOf(card.before, card.after));
  if (card.note) parts.push(element("p", card.note, "faint"));
  return parts;
}

function lineageOf(card, model) {
  const list = element("ol");
  list.setAttribute("aria-label", "Lineage, oldest first");
  list.append(element("li", card.is_lineage_whole ? (model.parent ?? card.base) : "not known beyond this"));
  for (const parent of [...card.lineage].reverse()) list.append(element("li", `${parent.tag}, step ${parent.step}`));
  list.append(element("li", `this one: run ${card.run}, step ${card.steps}`));
  return list;
}

function factsOf(card) {
  const facts = [];
  if (card.created) facts.push(card.created.slice(0, 10));
  if (card.rank !== null) facts.push(`rank ${card.rank}`);
  if (card.train_rows !== null) facts.push(`${card.train_rows.toLocaleString("en")} training rows`);
  if (card.epochs !== null) facts.push(`${Number(card.epochs.toFixed(2))} epoch${card.epochs === 1 ? "" : "s"}`);
  if (card.eval_loss !== null) facts.push(`validation loss ${card.eval_loss.toFixed(4)}`);
  return facts.join(" · ");
}

function scoresOf(before, after) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of [`${(after ?? before).rows.toLocaleString("en")} held-out rows`, "base", "this one"]) {
    const cell = element("th", title);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  const line = (title, shown, isBetter) => {
    const row = body.insertRow();
    const first = element("th", title);
    first.scope = "row";
    row.append(first, element("td", shown(before)), element("td", shown(after), isBetter ? "better" : ""));
  };
  const isLower = (key) => before?.[key] != null && after?.[key] != null && after[key] < before[key];
  line("loss", (score) => number(score?.loss), isLower("loss"));
  line("perplexity", (score) => number(score?.perplexity), isLower("perplexity"));
  const metric = after?.metric ?? before?.metric;
  if (metric) {
    const isBetter = before?.value != null && after?.value != null && after.value > before.value;
    line(metric.replaceAll("_", " "), share, isBetter);
  }
  return table;
}

function number(value) {
  if (value == null) return "–";
  return value < 100 ? value.toFixed(4) : value.toLocaleString("en", { maximumFractionDigits: 1 });
}

function share(score) {
  if (score?.value == null) return "–";
  const percent = (value) => (value * 100).toFixed(0);
  const interval = score.interval ? ` (${percent(score.interval[0])} to ${percent(score.interval[1])})` : "";
  return `${percent(score.value)} %${interval}`;
}

// ---- The page

byId("ask").addEventListener("submit", run);
byId("stop").addEventListener("click", () => running?.abort());
byId("refresh").addEventListener("click", loadModels);
byId("more").addEventListener("click", showMore);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = byId("key").value.trim();
  byId("key").value = "";
  loadModels();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
loadModels();
