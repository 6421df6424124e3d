// Numbers as people read them.
"use strict";

const format = (() => {
  const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
  const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

  function bytes(value) {
    if (!known(value)) return "–";
    let unit = 0;
    while (value >= 999.5 && unit < UNITS.length - 1) {
      value /= 1000;
      unit += 1;
    }
    return `${unit && value < 99.95 ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
  }

  function number(value) {
    if (!known(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
    if (size >= 100) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(3)));
  }

  function seconds(value) {
    if (!known(value)) return "–";
    if (value < 0.9995) return `${number(value * 1000)} ms`;
    if (value < 60) return `${number(value)} s`;
    const minutes = Math.floor(value / 60);
    if (minutes < 60) return `${minutes} min ${Math.floor(value % 60)} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  function whole(value) {
    return known(value) ? Math.round(value).toLocaleString("en") : "–";
  }

  return { bytes, known, number, seconds, whole };
})();
