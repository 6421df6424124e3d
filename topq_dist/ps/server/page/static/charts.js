// A chart of one number over versions, drawn by uPlot and kept up to date in place.
"use strict";

const Chart = (() => {
  const { createElement, createRef, Component } = preact;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function axis(show) {
    return {
      stroke: color("--muted"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
      size: 44,
      values: (_, values) => values.map(show),
    };
  }

  // from zero where that leaves half of the chart to the line; calm: where a tenth is no news
  const rangeOf = (calm) => (_, low, high) => {
    if (low === null || low === undefined) return [0, 1];
    const least = low >= 0 && low < high / 2 ? 0 : low;
    const spread = high - least || Math.abs(high) || 1;
    const room = calm && spread < high / 10 ? high / 10 : spread * 0.08;
    return [least === 0 ? 0 : least - room, high + room];
  };

  return class extends Component {
    constructor(props) {
      super(props);
      this.box = createRef();
      this.drawAnew = this.drawAnew.bind(this);
    }

    componentDidMount() {
      this.dark = matchMedia("(prefers-color-scheme: dark)");
      this.dark.addEventListener("change", this.drawAnew);
      this.sizes = new ResizeObserver(() => {
        if (this.plot) this.plot.setSize(this.size());
      });
      this.sizes.observe(this.box.current);
      this.drawAnew();
    }

    componentWillUnmount() {
      this.dark.removeEventListener("change", this.drawAnew);
      this.sizes.disconnect();
      if (this.plot) this.plot.destroy();
    }

    componentDidUpdate() {
      if (this.plot) this.plot.setData(this.data());
    }

    size() {
      return { width: Math.max(120, this.box.current.clientWidth), height: 170 };
    }

    data() {
      return [this.props.versions, this.props.values];
    }

    drawAnew() {
      if (this.plot) this.plot.destroy();
      const show = this.props.show;
      const x = axis((value) => value.toLocaleString("en"));
      x.size = 28;
      x.space = 70;
      x.incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6];
      const y = axis((value) => show(value));
      y.size = 64;
      y.space = 36;
      this.plot = new uPlot(
        {
          ...this.size(),
          legend: { show: false },
          cursor: { y: false, points: { size: 7 } },
          scales: { x: { time: false }, y: { range: rangeOf(this.props.calm) } },
          axes: [x, y],
          series: [
            {},
            {
              stroke: color(this.props.stroke),
              fill: color(this.props.stroke) + "22",
              width: 1.6,
              points: { show: false },
              spanGaps: true,
            },
          ],
          hooks: { setCursor: [(plot) => this.point(plot.cursor.idx)] },
        },
        this.data(),
        this.box.current,
      );
    }

    // what lies under the pointer, in place of the newest
    point(at) {
      const shown = at === null || at === undefined ? null : at;
      if (shown !== this.state.at) this.setState({ at: shown });
    }

    leave() {
      this.plot.setCursor({ left: -10, top: -10 }, false);
      this.point(null);
    }

    move(event) {
      const last = this.props.versions.length - 1;
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -50, PageDown: 50 }[event.key];
      if (last < 0 || (!step && event.key !== "Home" && event.key !== "End")) return;
      event.preventDefault();
      const from = this.state.at ?? last;
      const at = event.key === "Home" ? 0 : event.key === "End" ? last : from + step;
      const idx = Math.min(last, Math.max(0, at));
      const left = this.plot.valToPos(this.props.versions[idx], "x");
      const value = this.props.values[idx];
      this.plot.setCursor({ left, top: this.plot.valToPos(value ?? 0, "y") }, false);
      this.setState({ at: idx });
    }

    render({ title, note, versions, values, show }, { at }) {
      let newest = values.length - 1;
      while (newest > 0 && !format.known(values[newest])) newest -= 1;
      const shown = at !== null && at !== undefined && at < values.length ? at : newest;
      const value = format.known(values[shown]) ? show(values[shown]) : "–";
      const where = shown >= 0 ? `version ${versions[shown].toLocaleString("en")}` : "no version yet";
      const has = values.some(format.known);
      return createElement(
        "figure",
        { class: "chart" },
        createElement(
          "figcaption",
          null,
          createElement("span", { class: "title" }, title),
          createElement("span", { class: "value" }, value),
          createElement("span", { class: "where" }, where),
        ),
        createElement("div", {
          ref: this.box,
          class: has ? "plot" : "plot empty",
          tabIndex: 0,
          role: "img",
          "aria-label": `${title} over versions: ${value} at ${where}. Arrow keys go through them.`,
          onKeyDown: (event) => this.move(event),
          onBlur: () => this.leave(),
        }),
        createElement("p", { class: "note" }, has ? note : `${note} Nothing has been reported yet.`),
      );
    }
  };
})();
