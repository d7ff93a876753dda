// The page of `look`. Everything that comes from files is put on it as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const PAGE = 48; // moments at once
const view = { kind: "all", q: "", offset: 0, total: 0, title: "All moments", note: "", items: [] };
let state = null;
let chosen = null; // the selected moment
let asked = 0; // the newest request of a list: an older answer is dropped
let webm = document.createElement("video").canPlayType('video/mp4; codecs="avc1.640028"') === "";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children); // a string becomes a text node
  return element;
}

function say(text) {
  $("status").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("status").textContent = ""; }, 5000);
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The program that shows this page has ended: start it again.");
  }
  const answer = await response.json().catch(() => ({ error: "This page is out of date: open the address that the program printed." }));
  if (!response.ok && response.status !== 409) throw new Error(answer.error || "refused");
  return answer;
}

const query = (values) => new URLSearchParams(values).toString();
const attempt = (work) => async (...args) => {
  try { await work(...args); } catch (error) { say(error.message); }
};

function clock(seconds) {
  const whole = Math.floor(seconds), rest = Math.round((seconds - whole) * 10);
  const carry = rest === 10 ? 1 : 0;
  const total = whole + carry, minutes = Math.floor(total / 60);
  const text = `${String(total % 60).padStart(2, "0")}.${rest % 10}`;
  return minutes >= 60
    ? `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${text}`
    : `${minutes}:${text}`;
}

const chips = (item) => item.labels.map((name) => make("span", { class: "chip" }, name));
const span = (item) => item.picture ? "picture" : `${clock(item.start)}–${clock(item.end)}`;

// ---- lists

function card(item, place) {
  const labels = make("span", { class: "chips" }, ...chips(item));
  const score = item.score === undefined ? "" : item.score.toFixed(2);
  const button = make("button", {
    type: "button", class: "card", "data-place": place, "data-n": item.n,
    onclick: attempt(() => choose(place)),
  },
    make("img", { src: `/thumbnail/${item.n}.jpg`, alt: "", loading: "lazy", decoding: "async" }),
    make("span", { class: "text" },
      make("span", { class: "video" }, item.video),
      make("span", { class: "time" }, make("span", {}, span(item)), make("span", {}, score)),
      labels));
  button.title = item.video;
  button.setAttribute("aria-current", chosen && chosen.n === item.n ? "true" : "false");
  return button;
}

function draw() {
  const moments = $("moments"), pairs = view.kind === "near";
  moments.className = pairs ? "pairs" : "";
  const cards = view.items.map(card);
  if (pairs) {
    const boxes = new Map();
    view.items.forEach((item, i) => {
      if (!boxes.has(item.pair)) boxes.set(item.pair, make("div", { class: "pair" }));
      boxes.get(item.pair).append(cards[i]);
    });
    moments.replaceChildren(...boxes.values());
  } else {
    moments.replaceChildren(...cards);
  }
  if (!view.items.length) {
    const why = { near: "No two videos have nearly the same moment.", unlabelled: "Every moment has a label." };
    moments.append(make("p", { class: "quiet" }, why[view.kind] || "There is nothing here."));
  }
  $("range").textContent = view.total
    ? `${(view.offset + 1).toLocaleString()}–${(view.offset + view.items.length).toLocaleString()} of ${view.total.toLocaleString()}`
    : "none";
  $("before").disabled = view.offset === 0;
  $("after").disabled = view.offset + view.items.length >= view.total;
}

function mark() {
  $("heading").textContent = view.title;
  $("told").textContent = view.note;
  $("told").hidden = !view.note;
  // On a narrow screen the list is below the selected moment.
  if (matchMedia("(max-width: 48rem)").matches) $("heading").scrollIntoView({ block: "nearest" });
  for (const button of document.querySelectorAll(".view")) {
    const kind = button.dataset.kind;
    button.setAttribute("aria-pressed", String(kind === view.kind || (kind === "groups" && view.kind === "group")));
  }
  $("count").hidden = view.kind !== "groups";
  document.querySelector(".pages").hidden = view.kind === "groups";
}

async function show(kind, q, title, place = { offset: 0 }) {
  const mine = ++asked;
  const answer = await ask(`/api/view?${query({ kind, q, ...place, limit: PAGE })}`);
  if (mine !== asked) return;
  Object.assign(view, { kind, q, title, note: answer.note, offset: answer.offset, total: answer.total, items: answer.items });
  mark();
  draw();
}

async function turn(step) {
  const button = step > 0 ? $("after") : $("before");
  if (view.kind === "groups" || button.disabled) return;
  // In a list that gets shorter while its moments are labelled: behind the last one, before the first.
  const place = ["unlabelled", "label", "first"].includes(view.kind)
    ? { beside: view.items.at(step > 0 ? -1 : 0).n, step }
    : { offset: Math.max(0, view.offset + step * PAGE) };
  await show(view.kind, view.q, view.title, place);
  $("heading").focus({ preventScroll: true });
  window.scrollTo({ top: 0 });
}

async function showGroups() {
  const mine = ++asked;
  say("Grouping …");
  const k = Math.min(100, Math.max(2, Number($("wanted").value) || 12));
  const answer = await ask(`/api/groups?${query({ k })}`);
  if (mine !== asked) return;
  say("");
  Object.assign(view, { kind: "groups", q: "", title: "Groups of similar moments", note: "", offset: 0, total: 0, items: [] });
  mark();
  $("moments").className = "";
  $("moments").replaceChildren(...answer.groups.map((group, i) => make("button", {
    type: "button", class: "card group",
    onclick: attempt(() => show("group", `${answer.k}:${i}`, `Group ${i + 1}`)),
  },
    make("span", { class: "card-images" }, ...group.examples.map((n) => make("img", { src: `/thumbnail/${n}.jpg`, alt: "", loading: "lazy" }))),
    make("span", { class: "text" }, `Group ${i + 1}: ${group.size.toLocaleString()}`))));
}

// ---- the selected moment

async function choose(place, focus = false) {
  const item = view.items[place];
  if (!item) return;
  const same = chosen && chosen.n === item.n;
  chosen = item;
  for (const other of document.querySelectorAll(".card[data-n]")) {
    other.setAttribute("aria-current", String(Number(other.dataset.n) === item.n));
  }
  if (focus) document.querySelector(`.card[data-place="${place}"]`)?.focus();
  facts();
  if (!same) play();
}

function facts() {
  drawLabels();
  $("facts").hidden = !chosen;
  if (!chosen) return;
  $("where").textContent = chosen.video;
  $("times").textContent = span(chosen);
  $("captions").replaceChildren(...chosen.captions.map((text) => make("li", {}, text)));
  $("refused").hidden = !chosen.refused;
  $("refused").textContent = `Cannot be labelled: ${chosen.refused}`;
}

function play() {
  const player = $("player"), still = $("still");
  $("empty").hidden = true;
  player.hidden = chosen.picture;
  still.hidden = !chosen.picture;
  if (chosen.picture) {
    player.removeAttribute("src");
    still.src = `/thumbnail/${chosen.n}.jpg`;
    return;
  }
  player.src = `/clip/${chosen.n}.${webm ? "webm" : "mp4"}`;
  player.poster = `/thumbnail/${chosen.n}.jpg`;
}

function wirePlayer() {
  const player = $("player");
  player.addEventListener("loadedmetadata", () => {
    if (!chosen) return;
    player.currentTime = chosen.from;
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.play().catch(() => {});
  });
  // The moment is played again and again; whoever drags the bar sees the rest of the clip.
  let dragged = false;
  player.addEventListener("seeking", () => { dragged = chosen && (player.currentTime > chosen.to + 0.1 || player.currentTime < chosen.from - 0.1); });
  player.addEventListener("timeupdate", () => {
    if (chosen && !dragged && !player.paused && player.currentTime >= chosen.to) player.currentTime = chosen.from;
  });
  player.addEventListener("ended", () => {
    if (!chosen) return;
    player.currentTime = chosen.from;
    player.play().catch(() => {});
  });
  player.addEventListener("error", () => {
    if (!chosen || webm || !player.error || player.error.code < 3) return;
    webm = true; // this browser has no H.264
    play();
  });
}

// ---- labels

function drawLabels() {
  const rows = state.labels.map((label, i) => {
    const given = Boolean(chosen) && chosen.labels.includes(label.name);
    const give = make("button", {
      type: "button", class: "give", "aria-pressed": String(given),
      onclick: attempt(() => toggle(label.name)),
    }, ...(i < 9 ? [make("kbd", {}, String(i + 1))] : []), make("span", {}, label.name));
    give.disabled = !chosen || Boolean(chosen.refused);
    const list = make("button", {
      type: "button", "aria-label": `Show the ${label.count} moments labelled ${label.name}`,
      onclick: attempt(() => show("label", label.name, `Labelled ${label.name}`)),
    }, String(label.count));
    list.disabled = !label.count;
    return make("li", {}, give, list);
  });
  $("labels").replaceChildren(...rows);
}

function take(answer) {
  state = answer;
  for (const item of answer.items || []) refresh(item);
  $("changed").hidden = !answer.changed;
  $("changed-text").textContent = answer.changed || "";
  $("saved").textContent = `Labels are saved in ${state.saved}`;
  facts();
}

function refresh(item) {
  view.items.forEach((other, i) => {
    if (other.n !== item.n) return;
    other.labels = item.labels;
    const old = document.querySelector(`.card[data-place="${i}"] .chips`);
    if (old) old.replaceChildren(...chips(item));
  });
  if (chosen && chosen.n === item.n) chosen.labels = item.labels;
}

// One after the other, in the order of the keys.
let queue = Promise.resolve();
const inTurn = (work) => (queue = queue.then(work, work));

function toggle(name) {
  if (!chosen) return say("Choose a moment first.");
  const { n } = chosen;
  return inTurn(attempt(async () => {
    const answer = await ask("/api/label", { n, label: name });
    take(answer);
    const given = answer.items[0].labels.includes(name);
    if (!answer.changed) say(`${given ? "Labelled" : "No longer labelled"} ${name}`);
  }));
}

function undo() {
  return inTurn(attempt(async () => {
    take(await ask("/api/undo", {}));
    await again();
    say("Undone");
  }));
}

async function again() {
  if (view.kind === "groups") return;
  const focused = document.activeElement?.dataset?.place;
  await show(view.kind, view.q, view.title, { offset: view.offset });
  if (focused !== undefined) document.querySelector(`.card[data-place="${focused}"]`)?.focus();
  if (chosen) {
    const found = await ask(`/api/view?${query({ kind: "all", offset: chosen.n, limit: 1 })}`);
    if (found.items[0]) chosen.labels = found.items[0].labels;
    facts();
  }
}

// ---- keys

function columns() {
  const cards = [...document.querySelectorAll("#moments .card[data-n]")];
  const top = cards.length ? cards[0].getBoundingClientRect().top : 0;
  return Math.max(1, cards.filter((c) => Math.abs(c.getBoundingClientRect().top - top) < 4).length);
}

function move(step) {
  const focused = document.activeElement?.dataset?.place;
  const at = focused !== undefined ? Number(focused) : view.items.findIndex((item) => chosen && item.n === chosen.n);
  const next = at < 0 ? 0 : at + step;
  if (next >= 0 && next < view.items.length) return choose(next, true);
}

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement;
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !state) return;
  const inPlayer = event.target.id === "player";
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
  if (event.key in steps && !inPlayer && view.items.length) {
    event.preventDefault();
    return move(steps[event.key]);
  }
  if (event.key === "/") { event.preventDefault(); return $("sentence").focus(); }
  if (event.key === "[") return attempt(turn)(-1);
  if (event.key === "]") return attempt(turn)(1);
  if (event.key.toLowerCase() === "u") return undo();
  if (event.key.toLowerCase() === "m" && chosen) return $("like").click();
  if (event.key === " " && chosen && !chosen.picture && (event.target === document.body || event.target.dataset?.place !== undefined)) {
    const current = event.target.dataset?.place;
    if (current !== undefined && view.items[current].n !== chosen.n) return; // the button chooses it
    event.preventDefault();
    const player = $("player");
    return player.paused ? player.play() : player.pause();
  }
  if (/^[1-9]$/.test(event.key)) {
    const label = state.labels[Number(event.key) - 1];
    if (!label) return say(`There is no label ${event.key} yet: add one.`);
    return toggle(label.name);
  }
});

// ---- start

function wireViews() {
  for (const button of document.querySelectorAll(".view")) {
    const titles = { all: "All moments", unlabelled: "Moments without a label", first: "Label these first", near: state.near };
    const kind = button.dataset.kind;
    button.addEventListener("click", attempt(() => {
      if (kind === "groups") return showGroups();
      if (kind === "near") say("Comparing …");
      return show(kind, "", titles[kind]).then(() => say(""));
    }));
  }
}

async function start() {
  history.replaceState(null, "", "/"); // the token is not to be seen, nor to stay in the history
  state = await ask("/api/state");
  wirePlayer();
  wireViews();
  $("wanted").addEventListener("change", attempt(showGroups));
  $("before").addEventListener("click", attempt(() => turn(-1)));
  $("after").addEventListener("click", attempt(() => turn(1)));
  $("search").addEventListener("submit", attempt(async (event) => {
    event.preventDefault();
    const text = $("sentence").value.trim();
    if (text) await show("text", text, `“${text}”`);
  }));
  $("like").addEventListener("click", attempt(async () => {
    if (chosen) await show("like", String(chosen.n), `Like ${chosen.video}, ${span(chosen)}`);
  }));
  $("add").addEventListener("submit", attempt(async (event) => {
    event.preventDefault();
    const name = $("new").value.trim();
    if (!name) return;
    take(await ask("/api/keys", { add: name }));
    $("new").value = "";
    say(`Added ${name}`);
  }));
  $("undo").addEventListener("click", () => undo());
  $("cut").addEventListener("click", attempt(async () => {
    say("Writing clips …");
    const answer = await ask("/api/cut", {});
    $("written").textContent = `Written: ${answer.told}`;
    $("written").hidden = false;
    say("Clips are written");
  }));
  $("reload").addEventListener("click", attempt(async () => {
    take(await ask("/api/reload", {}));
    await again();
    if ($("changed").hidden) say("Read again");
  }));
  document.title = `Look: ${state.title}`;
  $("title").textContent = state.title;
  $("about").textContent = `${state.moments.toLocaleString()} moments of ${state.videos.toLocaleString()} videos, by ${state.backbone}`;
  $("search").hidden = !state.text;
  $("first").hidden = !state.first;
  $("notes").replaceChildren(...state.notes.map((note) => make("p", {}, note)));
  $("saved").textContent = `Saved in ${state.saved}`;
  facts();
  if (state.first) await show("first", "", "Label these first");
  else await show("all", "", "All moments");
}

attempt(start)();
