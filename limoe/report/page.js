// Shows the values under the pointer in every chart.
"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
document.querySelectorAll("figure.chart").forEach((figure, place) => {
  const chart = charts[place];
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);

  const written = (value) => chart.percent ? (100 * value).toFixed(1) + "%" : value.toLocaleString("en", {maximumSignificantDigits: 4});

  function nearest(steps, wanted) {
    let best = 0;
    steps.forEach((step, i) => { if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = i; });
    return best;
  }

  function show(event) {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.width;
    const wanted = (x - chart.left) / (chart.right - chart.left) * chart.last;
    const first = chart.series[0];
    const step = first.step[nearest(first.step, wanted)];
    const at = chart.left + step / chart.last * (chart.right - chart.left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    const lines = chart.series.map((one) => one.name + " " + written(one.value[nearest(one.step, step)]));
    tip.replaceChildren("step " + Math.round(step).toLocaleString("en"), ...lines.flatMap((line) => [document.createElement("br"), line]));
    tip.hidden = false;
    const left = box.left - figure.getBoundingClientRect().left + at / chart.width * box.width;
    tip.style.left = Math.max(4, Math.min(left + 10, figure.clientWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = svg.offsetTop + 8 + "px";
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
});
