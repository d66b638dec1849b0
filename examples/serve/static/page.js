"use strict";

const element = (id) => document.getElementById(id);
const [form, task, topk, image, drop] = ["form", "task", "topk", "image", "drop"].map(element);
const [preview, send, results] = [element("preview"), element("send"), element("classes")];
const section = results.closest("section");

let tasks = [];
let limits = null;
let file = null;
let pending = null; // The request that is under way: a newer one takes its place.
let settled = null; // What was last answered, or refused for good: asking again would change nothing.

function say(text) {
  element("status").textContent = text;
}

function complain(text) {
  element("error").hidden = !text;
  element("error").textContent = text;
  if (text) clear();
}

function clear() {
  results.replaceChildren();
  say("");
  element("cost").textContent = "";
}

function size(bytes) {
  if (bytes < 2 ** 10) return `${bytes} ${bytes === 1 ? "byte" : "bytes"}`;
  if (bytes < 2 ** 20) return `${+(bytes / 2 ** 10).toFixed(1)} KiB`;
  return `${+(bytes / 2 ** 20).toFixed(1)} MiB`;
}

async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. It may be down, or the upload was cut off.");
  }
  const text = await response.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy, or the server's last line of defence, answers in plain text.
  }
  if (response.ok && body) return body;
  const message = body?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  throw Object.assign(new Error(message), { status: response.status });
}

function asked() {
  return { file, task: task.value, topk: topk.value };
}

// The button is there where pressing it may change something.
function offer() {
  const [now, before] = [asked(), settled];
  const same = before && Object.keys(now).every((key) => now[key] === before[key]);
  send.hidden = !file || !tasks.length || pending !== null || Boolean(same);
  send.textContent = element("error").hidden ? "Classify" : "Try again";
}

function percent(probability) {
  const share = 100 * probability;
  if (share > 0 && share < 0.005) return "< 0.01%";
  return `${share.toFixed(share > 0 && share < 0.05 ? 2 : 1)}%`;
}

function row({ name, probability }) {
  const item = document.createElement("li");
  const [label, share, track, bar] = ["name", "share", "track", "bar"].map((kind) => {
    const span = document.createElement("span");
    span.className = kind;
    return span;
  });
  label.textContent = name;
  share.textContent = percent(probability);
  track.setAttribute("aria-hidden", "true");
  bar.style.width = `${100 * probability}%`;
  track.append(bar);
  item.append(label, " ", share, track);
  return item;
}

function show(answer) {
  const first = answer.classes[0];
  const others = answer.batch_size - 1;
  results.replaceChildren(...answer.classes.map(row));
  say(`${answer.task}: most likely ${first.name}, ${percent(first.probability)}`);
  element("cost").textContent =
    `${answer.ms.toFixed(1)} ms from the upload to the answer, in a batch ` +
    (others ? `with ${others} other ${others === 1 ? "image" : "images"}.` : "of its own.");
}

function wrongBefore() {
  if (!file) return "Choose an image first.";
  if (limits && file.size > limits.upload_bytes)
    return `The file has ${size(file.size)}; the server takes up to ${size(limits.upload_bytes)}. Choose a smaller one.`;
  if (!topk.checkValidity()) return "Classes to show must be a whole number, at least 1.";
  return "";
}

async function classify() {
  pending?.abort();
  pending = null;
  const wrong = wrongBefore();
  complain(wrong);
  const question = asked();
  settled = wrong ? question : null;
  if (wrong) {
    section.removeAttribute("aria-busy");
    offer();
    return;
  }
  const mine = new AbortController();
  pending = mine;
  section.setAttribute("aria-busy", "true");
  offer();
  say("Classifying …");
  const body = new FormData();
  body.append("image", file, file.name || "image");
  body.append("task", task.value);
  body.append("topk", topk.value);
  try {
    show(await ask("predict", { method: "POST", body, signal: mine.signal }));
    settled = question;
  } catch (error) {
    if (error.name === "AbortError") return;
    complain(error.message);
    // The image or the form is at fault, and stays so.
    if ([413, 422].includes(error.status)) settled = question;
  }
  if (pending === mine) {
    pending = null;
    section.removeAttribute("aria-busy");
    offer();
    // On narrow screens what was found stands below the form.
    section.scrollIntoView({ block: "nearest" });
  }
}

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  element("prompt").textContent = `${file.name || "Pasted image"}, ${size(file.size)}. Choose or drop another.`;
  if (tasks.length) classify();
}

function about() {
  const chosen = tasks.find(({ name }) => name === task.value);
  element("about").textContent = chosen
    ? `${tasks.length > 1 ? "" : `Task ${chosen.name}: `}${chosen.num_classes} classes, tuned with ${chosen.method} at ${chosen.input_size.slice(1).reverse().join(" x ")} pixels.`
    : "";
}

async function start() {
  element("form").closest("main").hidden = false;
  say("Loading …");
  try {
    ({ tasks, limits } = await ask("tasks"));
  } catch (error) {
    complain(`${error.message} Load this page again.`);
    return;
  }
  task.replaceChildren(...tasks.map(({ name }) => new Option(name, name)));
  element("how-many").textContent = ["no task", "one task"][tasks.length] ?? `${tasks.length} tasks`;
  if (!tasks.length) {
    complain("The server has no tasks. Add an adapter to it, and load this page again.");
    return;
  }
  form.hidden = false;
  element("tasks").hidden = tasks.length === 1;
  element("limits").textContent =
    `Up to ${size(limits.upload_bytes)} and ${(limits.pixels / 1e6).toLocaleString("en")} megapixels: ${limits.formats.join(", ")}.`;
  about();
  if (file) classify();
  else say("Choose an image to see what the model takes it for.");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
form.noValidate = true;
image.addEventListener("change", () => {
  choose(image.files[0]);
  image.value = ""; // The same file may be chosen again.
});
topk.addEventListener("input", offer);
task.addEventListener("change", () => {
  about();
  if (file) classify();
});
preview.addEventListener("load", () => {
  preview.hidden = false;
  preview.alt = `Preview of ${file.name || "the pasted image"}`;
  preview.classList.toggle("small", Math.max(preview.naturalWidth, preview.naturalHeight) < 128);
});
preview.addEventListener("error", () => {
  preview.hidden = true; // The browser does not know the format; the server may.
});
// Files that miss the box must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, () => drop.classList.add("over"));
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
window.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));

start();
