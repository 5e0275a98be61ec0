// Curves as SVG: a title for each point, a table as alternative.

function points(events, field) {
  const found = events.filter((event) => event.type === "metrics" && event.data?.[field] !== undefined);
  return found.map(({ data }) => [data.step, data[field]]).sort((a, b) => a[0] - b[0]);
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= 0.7 * rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(i * step || 0); // and no -0
  return out;
}

function drawn(tag, attributes, text) {
  const one = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  if (text !== undefined) one.textContent = text;
  return one;
}

const spread = (low, high) => (high > low ? [low, high] : [low - (Math.abs(low) / 10 || 1), low + (Math.abs(low) / 10 || 1)]);

function chart(name, all) {
  const series = all.filter(([, values]) => values.length > 0);
  if (series.length === 0) return null;
  const [width, height, west, east, north, south] = [360, 190, 48, 12, 8, 24];
  const every = series.flatMap(([, values]) => values);
  const [least, most] = [0, 1].map((at) => (pick) => every.reduce((found, point) => pick(found, point[at]), every[0][at]));
  const [first, last] = spread(least(Math.min), least(Math.max));
  const [bottom, top] = name.includes("accuracy") ? [0, 1] : spread(most(Math.min), most(Math.max));
  const x = (step) => west + ((width - west - east) * (step - first)) / (last - first);
  const y = (value) => height - south - ((height - south - north) * (value - bottom)) / (top - bottom);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const value of ticks(bottom, top, 4)) {
    picture.append(drawn("line", { x1: west, x2: width - east, y1: y(value), y2: y(value) }));
    picture.append(drawn("text", { class: "y", x: west - 5, y: y(value) + 3.5 }, figure(value)));
  }
  for (const step of ticks(first, last, 4).filter(Number.isInteger)) picture.append(drawn("text", { class: "x", x: x(step), y: height - 7 }, figure(step)));
  series.forEach(([label, values], number) => {
    const group = drawn("g", { class: `c${number}` });
    group.append(drawn("polyline", { points: values.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
    const dots = values.length <= 40 ? { r: 2.5 } : { r: 5, class: "hidden" };
    for (const [step, value] of values) {
      const dot = drawn("circle", { cx: x(step), cy: y(value), ...dots });
      dot.append(drawn("title", {}, `${label}, step ${step}: ${figure(value)}`));
      group.append(dot);
    }
    picture.append(group);
  });
  const ends = series.map(([label, values]) => `${label}: ${figure(values[0][1])} at step ${values[0][0]}, ${figure(values.at(-1)[1])} at step ${values.at(-1)[0]}`);
  picture.setAttribute("aria-label", `${name} by step. ${ends.join(". ")}`);
  const legend = holding("ul", "legend", ...series.map(([label, values], number) => holding("li", "", made("span", "", `key c${number}`), `${label}: ${figure(values.at(-1)[1])} at step ${values.at(-1)[0]}`)));
  return holding("figure", "", made("figcaption", name), picture, legend, table(name, series));
}

function table(name, series) {
  const values = series.map(([, points]) => new Map(points));
  const steps = [...new Set(values.flatMap((one) => [...one.keys()]))].sort((a, b) => a - b);
  const head = holding("tr", "", ...["step", ...series.map(([label]) => label)].map((one) => made("th", one, "number", { scope: "col" })));
  const rows = steps.map((step) => holding("tr", "", ...[figure(step), ...values.map((one) => (one.has(step) ? figure(one.get(step)) : ""))].map((one) => made("td", one, "number"))));
  const whole = holding("table", "", made("caption", `${name} by step`), holding("thead", "", head), holding("tbody", "", ...rows));
  const box = holding("div", "scroll", whole);
  box.tabIndex = 0;
  const details = holding("details", "", made("summary", "as a table"), box);
  details.dataset.name = name;
  return details;
}
