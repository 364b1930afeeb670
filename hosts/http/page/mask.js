// A brush for the mask: strokes over the input image, in a dialog. Painted parts may change.
"use strict";

const painted = { source: null, strokes: [] }; // strokes of the last dialog, kept for its image

function paintMask() {
  const source = byId("field-init_image").files[0];
  if (!source) {
    byId("field-init_image").focus();
    return showError(new Error("Choose an input image first: the mask is painted over it."));
  }
  showError(null);
  if (painted.source !== source) Object.assign(painted, { source, strokes: [] });
  const image = make("img", { alt: "", src: URL.createObjectURL(source) });
  image.onload = () => openBrush(image);
  image.onerror = () => showError(new Error(`${source.name} cannot be shown.`));
}

function openBrush(image) {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = make("canvas", { width, height });
  canvas.setAttribute("aria-label", "Paint what may change");
  const size = make("input", { type: "range", min: 1, max: 100, value: 20, id: "brush-size" });
  const button = (textContent, onclick, className = "quiet") =>
    make("button", { type: "button", textContent, onclick, className });
  const change = (strokes) => { painted.strokes = strokes; drawStrokes(canvas, painted.strokes); };
  const fault = make("p", { className: "hint", role: "alert" });
  const done = () => dialog.close();
  const dialog = make("dialog", { id: "brush" },
    make("div", { className: "layers" }, image, canvas),
    make("label", { htmlFor: size.id }, "Brush", size),
    make("p", { className: "actions" },
      button("Use mask", () => useMask(width, height).then(done, (e) => { fault.textContent = e.message; }), ""),
      button("Undo", () => change(painted.strokes.slice(0, -1))),
      button("Start over", () => change([])),
      button("Cancel", done)),
    fault);
  dialog.addEventListener("close", () => { URL.revokeObjectURL(image.src); dialog.remove(); });
  listenToBrush(canvas, () => (size.value / 200) * Math.min(width, height));
  document.body.append(dialog);
  dialog.showModal();
  drawStrokes(canvas, painted.strokes);
}

// radiusOf: () -> the brush's radius in pixels of the image
function listenToBrush(canvas, radiusOf) {
  const point = (event) => [
    (event.offsetX / canvas.clientWidth) * canvas.width,
    (event.offsetY / canvas.clientHeight) * canvas.height,
  ];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    painted.strokes.push({ radius: radiusOf(), points: [point(event)] });
    drawStrokes(canvas, painted.strokes);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    painted.strokes.at(-1).points.push(point(event));
    drawStrokes(canvas, painted.strokes);
  });
}

function drawStrokes(canvas, strokes, background = null) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (background) {
    context.fillStyle = background;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  Object.assign(context, { lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  for (const { radius, points } of strokes) {
    context.lineWidth = 2 * radius;
    context.beginPath();
    context.moveTo(...points[0]);
    for (const one of points) context.lineTo(...one);
    context.stroke();
  }
}

// the mask as a file of the image's size, white where something was painted
async function useMask(width, height) {
  if (!painted.strokes.length) throw new Error("Nothing is painted. Paint what may change.");
  const canvas = make("canvas", { width, height });
  drawStrokes(canvas, painted.strokes, "black");
  const blob = await new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
  setFile(byId("field-mask_image"), new File([blob], "mask.png", { type: "image/png" }));
}
