// The chat with two models.

const chats = [[], []]; // messages of each column
let talking = null;

async function talk() {
  const text = element("message").value;
  if (!text.trim()) return;
  talking = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  element("message").value = "";
  const both = [0, 1].map((column) => answer(column, text, talking.signal));
  const failed = (await Promise.allSettled(both)).find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
  element("send").disabled = false;
  element("stop").disabled = true;
  element("message").focus();
  if (failed) throw failed.reason;
}

function said(column, role, text) {
  const body = made("pre", text, "", { dir: "auto" });
  const log = element(`log-${column}`);
  log.append(holding("div", `turn ${role}`, made("p", role === "user" ? "You" : short(element(`model-${column}`).value), "role"), body));
  log.scrollTop = log.scrollHeight;
  return body;
}

async function answer(column, text, signal) {
  const messages = chats[column];
  messages.push({ role: "user", content: text });
  said(column, "user", text);
  const log = element(`log-${column}`);
  log.setAttribute("aria-busy", "true"); // read out once it is whole
  const body = { model: element(`model-${column}`).value, messages: [...messages], stream: true };
  body.temperature = element("temperature").valueAsNumber;
  body.max_completion_tokens = element("most").valueAsNumber;
  const shownText = said(column, "assistant", "");
  let whole = "";
  try {
    const response = await ask("/v1/chat/completions", { method: "POST", body, signal });
    for await (const piece of streamed(response)) {
      whole += piece;
      const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      shownText.textContent = whole;
      if (low) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (!whole) {
      messages.pop();
      shownText.textContent = error.name === "AbortError" ? "(stopped)" : `(${error.message})`;
    }
    throw error;
  } finally {
    if (whole) messages.push({ role: "assistant", content: whole });
    log.setAttribute("aria-busy", "false");
  }
  if (!whole) {
    messages.push({ role: "assistant", content: "" });
    shownText.textContent = "(an empty answer)";
  }
}

// The pieces of text of a streamed answer.
async function* streamed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data: ") && one.trim() !== "data: [DONE]")) {
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) yield piece;
    }
  }
}

function clear() {
  talking?.abort();
  for (const column of [0, 1]) {
    chats[column].length = 0;
    element(`log-${column}`).replaceChildren();
  }
}
