// The image viewer: slices, window, heatmap. Forms work without it.
"use strict";

const MOST_PIXELS = 100e6; // of pictures kept in memory; the server forbids the disk cache
const NEIGHBOURS = 3; // fetched ahead on both sides

const viewer = document.getElementById("viewer");
if (viewer) start(viewer);

function start(viewer) {
  const slices = Number(viewer.dataset.slices);
  const series = `/series/${viewer.dataset.series}`;
  const byId = (id) => document.getElementById(id);
  const slider = byId("slice"), opacity = byId("opacity"), attention = byId("attention"), cursor = byId("cursor");
  const read = new Map(viewer.dataset.read.trim().split(" ").filter(Boolean).map((pair) => pair.split(":").map(Number)));
  const readSlices = [...read.keys()].sort((a, b) => a - b);
  const initial = { center: Number(viewer.dataset.center), width: Number(viewer.dataset.width) };
  const state = { z: Number(viewer.dataset.slice), ...initial, lastOpacity: 45 };
  const pictures = new Map();
  const mostPictures = Math.max(20, MOST_PIXELS / (byId("grey").width * byId("grey").height));
  let shown = { grey: byId("grey"), heat: byId("heat") };
  let drag = null; // where a window drag began
  let isLoading = false; // one slice at a time; what was asked for meanwhile is only the newest

  const greyUrl = (z) => `${series}/image/${z}.png?center=${state.center}&width=${state.width}`;
  const heatUrl = (z) => `${series}/heatmap/${z}.png?result=${viewer.dataset.result}`;

  function picture(url) {
    if (!pictures.has(url)) {
      const image = new Image();
      image.draggable = false;
      image.alt = "";
      image.src = url;
      pictures.set(url, image.decode().then(() => image));
      pictures.get(url).catch(() => pictures.delete(url));
      if (pictures.size > mostPictures) pictures.delete(pictures.keys().next().value);
    }
    return pictures.get(url);
  }

  function put(kind, image, alt) {
    image.id = kind;
    image.alt = alt;
    if (kind === "grey") {
      image.width = shown.grey.width;
      image.height = shown.grey.height;
    }
    image.hidden = false;
    image.style.opacity = kind === "heat" ? Number(opacity.value) / 100 : 1;
    if (shown[kind] !== image) shown[kind].replaceWith(image);
    shown[kind] = image;
  }

  async function show() {
    describe();
    if (isLoading) return;
    isLoading = true;
    let url;
    do {
      url = greyUrl(state.z);
      await load(state.z);
    } while (url !== greyUrl(state.z));
    isLoading = false;
    if (drag) return;
    for (let step = 1; step <= NEIGHBOURS; step++) {
      for (const near of [state.z + step, state.z - step]) if (near >= 0 && near < slices) picture(greyUrl(near)).catch(() => {});
    }
  }

  async function load(z) {
    const wanted = [picture(greyUrl(z))];
    if (shown.heat && read.has(z)) wanted.push(picture(heatUrl(z)));
    let images;
    try {
      images = await Promise.all(wanted);
    } catch {
      for (const image of Object.values(shown)) if (image) image.hidden = true; // never another slice under this number
      byId("where").textContent = `slice ${z + 1}: no image came. Reload the page; you may have to sign in again.`;
      return;
    }
    put("grey", images[0], `Slice ${z + 1} of ${slices}`);
    if (images[1]) put("heat", images[1], "");
    else if (shown.heat) shown.heat.hidden = true; // this slice was not read
    byId("where").textContent = place(z);
    viewer.dataset.shown = z;
  }

  function place(z) {
    const weight = read.get(z);
    const note = weight === undefined ? (readSlices.length ? " · not read by the AI" : "") : ` · ${Math.round(weight * 100)} % of the attention`;
    return slices > 1 ? `${z + 1} / ${slices}${note}` : "";
  }

  function describe() {
    byId("level").textContent = `L ${tidy(state.center)} · W ${tidy(state.width)}`;
    if (slider) slider.value = state.z;
    if (cursor) cursor.setAttribute("x", state.z);
    for (const button of document.querySelectorAll("button.window")) {
      const same = Number(button.dataset.center) === state.center && Number(button.dataset.width) === state.width;
      button.setAttribute("aria-pressed", same);
    }
  }

  const tidy = (value) => (Math.abs(value) < 10 ? value.toFixed(2) : value.toFixed(0));

  function go(z) {
    const next = Math.max(0, Math.min(slices - 1, z));
    if (next !== state.z) {
      state.z = next;
      show();
    }
  }

  function goToRead(direction) {
    const ahead = direction > 0 ? readSlices.find((z) => z > state.z) : readSlices.findLast((z) => z < state.z);
    if (ahead !== undefined) go(ahead);
  }

  function setWindow(center, width) {
    Object.assign(state, { center, width });
    show();
  }

  function setOpacity(value) {
    opacity.value = value;
    shown.heat.style.opacity = value / 100;
  }

  // The slider's thumb stands under the slice's bar: a thumb is 16 px wide and stops half of that before each end.
  if (slider) slider.style.width = `calc(${(100 * (slices - 1)) / slices}% + 16px)`;
  slider?.addEventListener("input", () => go(Number(slider.value)));
  opacity?.addEventListener("input", () => setOpacity(Number(opacity.value)));
  byId("invert").addEventListener("click", (event) => {
    const inverted = viewer.classList.toggle("inverted");
    event.currentTarget.setAttribute("aria-pressed", inverted);
  });
  for (const button of document.querySelectorAll("button.window")) {
    button.addEventListener("click", () => setWindow(Number(button.dataset.center), Number(button.dataset.width)));
  }
  attention?.addEventListener("pointerdown", (event) => {
    const box = attention.getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * slices));
  });

  viewer.addEventListener("wheel", (event) => {
    if (slices === 1) return;
    event.preventDefault();
    go(state.z + Math.sign(event.deltaY));
  }, { passive: false });

  viewer.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drag = { x: event.clientX, y: event.clientY, center: state.center, width: state.width };
    viewer.setPointerCapture(event.pointerId);
  });
  viewer.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const step = initial.width / 300;
    const width = Math.max(initial.width / 200, drag.width + (event.clientX - drag.x) * step);
    const center = drag.center + (event.clientY - drag.y) * step;
    if (width !== state.width || center !== state.center) setWindow(round(center, step), round(width, step));
  });
  const round = (value, step) => Number((Math.round(value / (step * 4)) * step * 4).toPrecision(7)) || step;
  for (const end of ["pointerup", "pointercancel"]) viewer.addEventListener(end, () => (drag = null));
  viewer.addEventListener("dblclick", () => setWindow(initial.center, initial.width));

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input:not(#slice)")) return;
    const keys = {
      ArrowLeft: () => go(state.z - 1), ArrowDown: () => go(state.z - 1),
      ArrowRight: () => go(state.z + 1), ArrowUp: () => go(state.z + 1),
      PageUp: () => goToRead(1), PageDown: () => goToRead(-1),
      Home: () => go(0), End: () => go(slices - 1),
      h: toggleHeat, H: toggleHeat,
    };
    if (!keys[event.key] || (slices === 1 && !/^h$/i.test(event.key))) return;
    event.preventDefault();
    keys[event.key]();
  });

  function toggleHeat() {
    if (!opacity) return;
    if (Number(opacity.value) > 0) {
      state.lastOpacity = Number(opacity.value);
      setOpacity(0);
    } else setOpacity(state.lastOpacity);
  }

  if (shown.heat) put("heat", shown.heat, "");
  show();
}
