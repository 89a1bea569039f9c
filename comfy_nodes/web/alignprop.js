// What the AlignProp nodes show beyond ComfyUI's own widgets: parameters that follow the chosen reward, sockets that
// appear as they are used, presets, and the curve of a run.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const CURVE_HEIGHT = 140;

function widgetNamed(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function setHidden(widget, hidden) {
  widget.hidden = hidden;
  widget.options = { ...widget.options, hidden };
  if (hidden) widget.computeSize = () => [0, -4]; // older pages leave room for hidden widgets
  else delete widget.computeSize;
}

function specOf(nodeData, name) {
  return (nodeData.input?.required?.[name] ?? nodeData.input?.optional?.[name])?.[1] ?? {};
}

function fit(node) {
  const size = node.computeSize();
  node.setSize([Math.max(node.size[0], size[0]), size[1]]);
  node.setDirtyCanvas?.(true, true);
}

// A method of a node with more to do after it.
function after(node, name, more) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    more.apply(this, args);
    return result;
  };
}

// A seed that changes by itself would train anew at every run.
function keepSeed(node) {
  for (const control of widgetNamed(node, "seed")?.linkedWidgets ?? []) {
    if (control.options?.values?.includes?.("fixed")) control.value = "fixed";
  }
}

// --- Reward: a widget for each parameter, written to the hidden widget "parameters" as JSON -------------------------

function parsed(text) {
  try {
    const value = JSON.parse(text || "{}");
    return value && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

function addParameter(node, spec, value, write) {
  const options = { min: spec.low, max: spec.high, step2: spec.step, step: (spec.step ?? 1) * 10, precision: 3, serialize: false };
  const kinds = {
    INT: () => node.addWidget("number", spec.name, value, write, { ...options, precision: 0 }),
    FLOAT: () => node.addWidget("number", spec.name, value, write, options),
    BOOLEAN: () => node.addWidget("toggle", spec.name, value, write, { serialize: false }),
    COMBO: () => node.addWidget("combo", spec.name, value, write, { values: spec.options, serialize: false }),
    STRING: () => node.addWidget("text", spec.name, value, write, { serialize: false }),
  };
  const widget = kinds[spec.kind]();
  widget.tooltip = spec.tooltip;
  widget.serialize = false; // the hidden widget is what is saved
  return widget;
}

function setUpReward(node, nodeData) {
  const rewards = specOf(nodeData, "reward").alignprop_rewards ?? {};
  const chosen = widgetNamed(node, "reward");
  const text = widgetNamed(node, "parameters");
  setHidden(text, true);
  let shown = [];

  function write() {
    const values = {};
    for (const { spec, widget } of shown) {
      if (widget.value !== spec.default && widget.value !== "") values[spec.name] = widget.value;
    }
    text.value = JSON.stringify(values);
  }

  function draw() {
    for (const { widget } of shown) node.widgets.splice(node.widgets.indexOf(widget), 1);
    const known = parsed(text.value);
    const specs = rewards[chosen.value]?.parameters ?? [];
    shown = specs.map((spec) => ({ spec, widget: addParameter(node, spec, known[spec.name] ?? spec.default, write) }));
    chosen.tooltip = rewards[chosen.value]?.about;
    fit(node);
  }

  const callback = chosen.callback;
  chosen.callback = function (...args) {
    callback?.apply(this, args);
    text.value = "{}";
    draw();
  };
  after(node, "onConfigure", draw);
  draw();
}

// --- Combine Rewards, Mix Adapters: one free socket more than is used -------------------------------------------------

function setUpTerms(node, kind, type, most) {
  function socket(number) {
    return node.inputs?.findIndex((input) => input.name === `${kind}_${number}`) ?? -1;
  }

  function linked(number) {
    const place = socket(number);
    return place >= 0 && node.inputs[place].link != null;
  }

  function update() {
    let last = 0;
    for (let number = 1; number <= most; number++) if (linked(number)) last = number;
    const wanted = Math.min(Math.max(last + 1, 2), most);
    for (let number = 1; number <= most; number++) {
      const place = socket(number);
      if (number <= wanted && place < 0) node.addInput(`${kind}_${number}`, type);
      if (number > wanted && place >= 0 && !linked(number)) node.removeInput(place);
      const weight = widgetNamed(node, `weight_${number}`);
      if (weight) setHidden(weight, number > wanted);
    }
    fit(node);
  }

  // Loading a workflow sets sockets and links itself; the sockets are tidied once it is done.
  after(node, "onConnectionsChange", () => setTimeout(update, 0));
  after(node, "onConfigure", () => setTimeout(update, 0));
  setTimeout(update, 0);
}

// --- Align: advanced settings, presets and the curve -----------------------------------------------------------------

function setUpAdvanced(node, nodeData) {
  const advanced = node.widgets.filter((widget) => specOf(nodeData, widget.name).advanced);
  function show(shown) {
    for (const widget of advanced) setHidden(widget, !shown);
    fit(node);
  }
  const widget = node.addWidget("toggle", "show advanced settings", false, show, { serialize: false });
  widget.serialize = false;
  show(false);
}

function setUpPresets(node, nodeData) {
  const presets = specOf(nodeData, "steps").alignprop_presets ?? {};
  const names = ["", ...Object.keys(presets)];
  const widget = node.addWidget("combo", "settings of", "", (name) => {
    for (const [key, value] of Object.entries(presets[name] ?? {})) {
      const target = widgetNamed(node, key);
      if (target) target.value = value;
    }
    node.setDirtyCanvas?.(true, true);
  }, { values: names, serialize: false });
  widget.tooltip = "fill in all settings: emoji for the bundled model, fast or paper for others";
  widget.serialize = false;
}

function line(pen, points, color, box, range) {
  pen.strokeStyle = pen.fillStyle = color;
  pen.lineWidth = 1.5;
  pen.beginPath();
  const at = ([step, value]) => [
    box.x + (step / Math.max(range.steps, 1)) * box.width,
    box.y + box.height * (1 - (value - range.low) / (range.high - range.low || 1)),
  ];
  points.forEach((point, number) => (number ? pen.lineTo(...at(point)) : pen.moveTo(...at(point))));
  pen.stroke();
  for (const point of points.length > 1 ? points.slice(-1) : points) {
    pen.beginPath();
    pen.arc(...at(point), 2.5, 0, 2 * Math.PI);
    pen.fill();
  }
}

function drawCurve(canvas, run) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 300;
  canvas.width = width * scale;
  canvas.height = CURVE_HEIGHT * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = "#1b1c1f";
  pen.fillRect(0, 0, width, CURVE_HEIGHT);
  const evidence = run.points.find((p) => p.of)?.of ?? "held-out";
  const series = {
    reward: { color: "#7f8a99", points: run.points.filter((p) => p.reward != null).map((p) => [p.step, p.reward]) },
    [evidence]: { color: "#f2a33a", points: run.points.filter((p) => p.held_out != null).map((p) => [p.step, p.held_out]) },
  };
  const values = Object.values(series).flatMap((one) => one.points.map((point) => point[1]));
  if (!values.length) return;
  const range = { low: Math.min(...values), high: Math.max(...values), steps: run.steps };
  const box = { x: 8, y: 22, width: width - 16, height: CURVE_HEIGHT - 40 };
  pen.font = "11px sans-serif";
  let place = box.x;
  for (const [name, { color, points }] of Object.entries(series)) {
    line(pen, points, color, box, range);
    if (!points.length) continue;
    const label = `${name} ${points[points.length - 1][1].toPrecision(3)}`;
    pen.fillText(label, place, 14);
    place += pen.measureText(label).width + 14;
  }
  pen.fillStyle = "#9aa3ad";
  pen.fillText(`step ${run.points[run.points.length - 1].step} of ${run.steps}`, box.x, CURVE_HEIGHT - 6);
}

function setUpCurve(node) {
  const canvas = document.createElement("canvas");
  canvas.style.width = "100%";
  canvas.style.height = `${CURVE_HEIGHT}px`;
  const widget = node.addDOMWidget("curve", "alignprop_curve", canvas, {
    serialize: false,
    getMinHeight: () => CURVE_HEIGHT,
    getMaxHeight: () => CURVE_HEIGHT,
  });
  widget.serialize = false;
  node.alignpropRun = { steps: 1, points: [] };
  node.alignpropShow = (run) => {
    node.alignpropRun = run;
    drawCurve(canvas, run);
  };
  after(node, "onExecuted", (output) => {
    const run = output?.alignprop_curve?.[0];
    if (run) node.alignpropShow(run);
  });
  after(node, "onResize", () => drawCurve(canvas, node.alignpropRun));
  drawCurve(canvas, node.alignpropRun);
}

// --- texts that nodes return -----------------------------------------------------------------------------------------

function setUpText(node) {
  const box = document.createElement("textarea");
  box.readOnly = true;
  box.className = "comfy-multiline-input";
  box.placeholder = "the result stands here after a run";
  const widget = node.addDOMWidget("result", "alignprop_text", box, {
    serialize: false,
    getMinHeight: () => 110,
    getValue: () => box.value,
    setValue: (text) => (box.value = text ?? ""),
  });
  widget.serialize = false;
  after(node, "onExecuted", (output) => {
    if (output?.text) box.value = [].concat(output.text).join("\n");
  });
}

const SET_UPS = {
  AlignPropReward: (node, nodeData) => setUpReward(node, nodeData),
  AlignPropCombineRewards: (node) => setUpTerms(node, "reward", "ALIGNPROP_REWARD", 8),
  AlignPropMixAdapters: (node) => setUpTerms(node, "adapter", "ALIGNPROP_ADAPTER", 4),
  AlignPropAlign: (node, nodeData) => {
    keepSeed(node);
    setUpAdvanced(node, nodeData);
    setUpPresets(node, nodeData);
    setUpCurve(node);
    setUpText(node);
  },
  AlignPropSample: keepSeed,
  AlignPropScore: setUpText,
  AlignPropSaveAdapter: setUpText,
  AlignPropPushToHub: setUpText,
};

app.registerExtension({
  name: "alignprop",

  beforeRegisterNodeDef(nodeType, nodeData) {
    const setUp = SET_UPS[nodeData.name];
    if (!setUp) return;
    after(nodeType.prototype, "onNodeCreated", function () {
      setUp(this, nodeData);
    });
  },

  setup() {
    api.addEventListener("alignprop.step", ({ detail }) => {
      const node = app.graph.getNodeById?.(Number(detail.node)) ?? app.graph.getNodeById?.(detail.node);
      if (!node?.alignpropShow) return;
      const points = detail.point.step === 0 || detail.point.step === 1 && !node.alignpropRun.points.some((p) => p.step === 0)
        ? [] : node.alignpropRun.points.filter((point) => point.step < detail.point.step);
      node.alignpropShow({ steps: detail.steps, points: [...points, detail.point] });
    });
  },
});
