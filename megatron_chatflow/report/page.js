'use strict';
const color = name =>
  getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
const template = () => {
  const axis = {gridcolor: color('grid'), linecolor: color('faint'), tickcolor: color('faint'),
    ticks: 'outside', zeroline: false, automargin: true, title: {standoff: 8}};
  const ink = {line: {color: color('ink')}, marker: {color: color('ink')}};
  return {data: {scatter: [ink]}, layout: {
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: color('soft')},
    paper_bgcolor: 'transparent', plot_bgcolor: 'transparent',
    margin: {l: 8, r: 12, t: 8, b: 8}, xaxis: {...axis, showgrid: false, showline: true,
      exponentformat: 'B'}, yaxis: axis, showlegend: true,
    legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', font: {color: color('ink')}},
    hoverlabel: {bgcolor: color('card'), bordercolor: color('edge'), font: {color: color('ink')}},
    dragmode: matchMedia('(pointer: coarse)').matches ? false : 'zoom'}};
};
const charts = [...document.querySelectorAll('figure')].map(figure => {
  const {data, layout} = JSON.parse(figure.querySelector('script').textContent);
  const plot = figure.querySelector('.plot');
  const key = figure.closest('article').id + figure.querySelector('h3').textContent;
  const draw = () => Plotly.react(plot, data, {...layout, template: template()},
    {responsive: true, displayModeBar: false});
  // A followed run's page is reloaded: curves that the reader has hidden stay hidden.
  let hidden = [];
  try { hidden = JSON.parse(sessionStorage.getItem(key)) || []; } catch { /* no storage */ }
  for (const trace of data) if (hidden.includes(trace.meta)) trace.visible = 'legendonly';
  draw();
  plot.on('plotly_restyle', () => {
    const off = plot.data.filter(trace => trace.visible === 'legendonly').map(trace => trace.meta);
    try { sessionStorage.setItem(key, JSON.stringify(off)); } catch { /* no storage */ }
  });
  let at = 1;  // position of the values that the arrow keys show, as a part of the x axis
  figure.addEventListener('keydown', event => {
    const step = {ArrowLeft: -0.01, ArrowRight: 0.01}[event.key];
    if (!step || event.target !== figure) return;
    event.preventDefault();
    at = Math.min(Math.max(at + step * (event.shiftKey ? 10 : 1), 0), 1);
    const [begin, end] = plot.layout.xaxis.range;
    Plotly.Fx.hover(plot, {xval: begin + at * (end - begin)}, ['xy']);
  });
  figure.addEventListener('blur', () => Plotly.Fx.unhover(plot));
  return draw;
});
matchMedia('(prefers-color-scheme: dark)').onchange = () => charts.forEach(draw => draw());
