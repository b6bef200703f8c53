// Shows the page's newest state every few seconds, without losing scroll, selection or open details.
"use strict";
const every = 4000;
async function refresh() {
  const selecting = String(getSelection()) !== "";
  if (document.hidden || selecting) return;
  const answer = await fetch(location.href, { redirect: "manual", credentials: "same-origin" });
  if (answer.type === "opaqueredirect") { location.reload(); return; }
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const newest = page.getElementById("main"), shown = document.getElementById("main");
  const open = [...shown.querySelectorAll("details")].map((details) => details.open);
  newest.querySelectorAll("details").forEach((details, index) => { details.open = open[index] ?? false; });
  if (!newest.isEqualNode(shown)) shown.replaceWith(document.adoptNode(newest));
}
setInterval(() => { refresh().catch(() => {}); }, every);  // hub away: the page stays, the next look may succeed
