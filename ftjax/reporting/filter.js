
"use strict";
// Samples that hold what is typed; without this script all of them are shown.
const field = document.getElementById("filter");
if (field) {
  field.closest("p").hidden = false;
  const samples = [...document.querySelectorAll("article")].map((one) => [one, one.textContent.toLowerCase()]);
  const closed = [...document.querySelectorAll("#samples details")].filter((one) => !one.open);
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    let count = 0;
    for (const [sample, text] of samples) {
      sample.hidden = !text.includes(wanted);
      count += !sample.hidden;
    }
    for (const group of closed) group.open = wanted !== "" && group.querySelector("article:not([hidden])") !== null;
    document.getElementById("matches").textContent = wanted ? `${count} of ${samples.length} samples` : "";
  });
}
