"""The report page's style sheet, light and dark, and its script for crosshair and legend.

In: nothing. Out: two strings that `report` puts into the page; nothing is loaded from elsewhere.
The eight series colours keep a contrast of 3:1 against both backgrounds; shapes and hatches
(`report_marks`) tell series apart for readers who see few hues.
"""

STYLE = """
:root{color-scheme:light dark;
--page:#f4f5f7;--card:#ffffff;--ink:#16202c;--soft:#556170;--faint:#8b96a3;--grid:#e7eaee;
--edge:#dde1e6;--shade:#16202c38;--accent:#1f5fbf;--good:#0b7a4b;--bad:#b3372b;
--c0:#2a6fdb;--c1:#d96a0b;--c2:#0c8f76;--c3:#b83a8c;--c4:#8a7200;--c5:#6a4fd0;--c6:#0f86a8;--c7:#c8323c}
@media (prefers-color-scheme:dark){:root{
--page:#10151b;--card:#181f27;--ink:#e8edf2;--soft:#a6b1bd;--faint:#7b8794;--grid:#262f39;
--edge:#2b3541;--shade:#000a;--accent:#7fb0ff;--good:#4fce95;--bad:#ff8b7d;
--c0:#5b9bff;--c1:#f5964a;--c2:#2fc3a2;--c3:#ee79c0;--c4:#d0b02f;--c5:#a48dff;--c6:#43bfe2;--c7:#ff737a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px}
h3{font-size:15px;margin:0}
p{margin:0}
.lead{color:var(--soft);margin-top:6px}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:0 0 22px}
a{color:var(--accent)}
article+article{margin-top:56px;border-top:1px solid var(--edge);padding-top:36px}
.progress{height:6px;border-radius:3px;background:var(--edge);margin-top:16px;overflow:hidden}
.progress i{display:block;height:100%;background:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin-top:18px}
.tile,.chart,.table,details{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tile{padding:12px 16px}
.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:2px 0 0;font-size:23px;font-weight:600;font-variant-numeric:tabular-nums}
.tile dd i{font-style:normal;font-size:15px;font-weight:500;color:var(--soft)}
.tile small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:16px}
.chart{margin:0;padding:16px 16px 8px;min-width:0;display:flex;flex-direction:column}
.chart.wide{grid-column:1/-1}
.chart:focus-visible,button:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
figcaption p{color:var(--soft);font-size:13px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 0 6px;padding:0;
font-size:13px;max-height:6.4em;overflow:auto}
.legend li,.legend button{display:inline-flex;align-items:center;gap:6px;min-width:0}
.legend span{overflow-wrap:anywhere;text-align:left}.legend b{white-space:nowrap}
.legend b{font-weight:600;font-variant-numeric:tabular-nums}
.legend button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
.legend button[aria-pressed=false]{opacity:.4;text-decoration:line-through}
.swatch{width:22px;height:12px;flex:none}
.swatch.dashed{height:0;border-top:2px dashed var(--ink)}
.swatch.mark{width:10px;height:8px;background:var(--bad);clip-path:polygon(0 0,100% 0,50% 100%)}
.swatch.mark.planned{background:var(--faint)}
.swatch.mark.edit{height:10px;background:var(--accent);
clip-path:polygon(50% 0,100% 50%,50% 100%,0 50%)}
.defs{position:absolute}
.ink{--s:var(--ink)}.rest{--s:var(--faint)}.c0{--s:var(--c0)}.c1{--s:var(--c1)}.c2{--s:var(--c2)}.c3{--s:var(--c3)}
.c4{--s:var(--c4)}.c5{--s:var(--c5)}.c6{--s:var(--c6)}.c7{--s:var(--c7)}
.plot{position:relative;overflow-x:auto;overflow-y:hidden;margin-top:auto}
/* What scrolls has a shadow at the side where more follows. */
.plot,.table,pre{background:linear-gradient(90deg,var(--card) 30%,transparent) 0/44px 100% local,
linear-gradient(270deg,var(--card) 30%,transparent) 100%/44px 100% local,
linear-gradient(90deg,var(--shade),transparent) 0/14px 100% scroll,
linear-gradient(270deg,var(--shade),transparent) 100%/14px 100% scroll;
background-color:var(--card);background-repeat:no-repeat}
.plot>svg{display:block;width:100%;min-width:470px;height:auto}
.wide .plot>svg{min-width:760px}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.ytick{text-anchor:end}.xtick,.label{text-anchor:middle}
svg .label{fill:var(--ink)}
.grid{stroke:var(--grid)}.base,.tick{stroke:var(--faint)}.zero{stroke:var(--faint)}
.level{stroke:var(--bad);stroke-dasharray:6 4;opacity:.8}
.line{fill:none;stroke:var(--s);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1;opacity:.85}
.ink .line{stroke-width:2.4}
.faint{fill:none;stroke:var(--s);stroke-width:1;opacity:.28}
.d1 .line{stroke-dasharray:7 4}.d2 .line{stroke-dasharray:2 4}
.shape{fill:var(--s);stroke:var(--card);stroke-width:1.2}
.shape.open{fill:none;stroke:var(--s);stroke-width:2.2}
.stroke{stroke:var(--card);stroke-width:1.6;stroke-linecap:round;fill:none}
.hatch{opacity:.6}
svg .inside{fill:#fff;font-size:13px;font-weight:600;text-anchor:middle;paint-order:stroke;
stroke:#0009;stroke-width:3px;stroke-linejoin:round}
.area{fill:var(--s);opacity:.78;stroke:var(--card);stroke-width:1}
.d1 .area{opacity:.55}.d2 .area{opacity:.35}
.plan,.plan-under{fill:none;stroke-linejoin:round}
.plan-under{stroke:var(--card);stroke-width:3.4;opacity:.75}
.plan{stroke:var(--ink);stroke-width:1.6;stroke-dasharray:7 5}
.mark line{stroke:var(--bad);stroke-dasharray:2 4;opacity:.75}.mark path{fill:var(--bad)}
.mark.planned line{stroke:var(--faint)}.mark.planned path{fill:var(--faint)}
.mark.edit line{stroke:var(--accent);stroke-dasharray:none}.mark.edit path{fill:var(--accent)}
.cursor line{stroke:var(--ink);stroke-width:1;opacity:.55}
.cursor circle{stroke:var(--card);stroke-width:2;fill:var(--s)}
.hit{fill:transparent}
.off{display:none}
.tip{position:absolute;top:8px;pointer-events:none;background:var(--card);color:var(--ink);z-index:2;
border:1px solid var(--edge);border-radius:8px;box-shadow:0 4px 18px #0003;padding:8px 11px;
font-size:12.5px;line-height:1.45;white-space:nowrap}
.tip[hidden]{display:none}
.tip table{border-collapse:collapse}.tip td{padding:0 0 0 10px;text-align:right}
.tip td:first-child{padding:0;text-align:left}.tip .swatch{display:inline-block;margin-right:6px;
vertical-align:middle}
.tip th{font-weight:400;color:var(--soft);text-align:right;padding-left:10px}
.table{overflow-x:auto;padding:6px 16px 10px}
.table table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.table caption{text-align:left;color:var(--soft);font-size:13px;padding:8px 0 4px}
.table th,.table td{padding:7px 12px;text-align:right;border-top:1px solid var(--grid);
white-space:nowrap}
.table thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
.table .name{text-align:left;padding-left:0}
.table .text{text-align:left;white-space:normal}
.table thead .span{text-align:center;border-bottom:1px solid var(--grid);padding-bottom:3px}
.table tbody th{font-weight:600}
.table .group{border-left:1px solid var(--edge)}
.table+.table,.charts+.table,.table+.charts{margin-top:16px}
.good{color:var(--good)}.bad{color:var(--bad)}
details{margin-top:16px;padding:10px 16px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:10px 0 4px}
pre .key{color:var(--accent)}
footer{color:var(--soft);font-size:13px;margin-top:36px}
@media print{body{background:#fff}.chart,.table,details{break-inside:avoid}}
@media (max-width:560px){main{padding:18px 12px 32px}
.plot>svg{min-width:0}.wide .plot>svg{min-width:640px}
svg text{font-size:18px}svg .inside{font-size:20px}.label.y{display:none}
.legend{max-height:none}}
@media (max-width:760px){
.table table,.table caption,.table tbody,.table tr,.table tbody th,.table td{display:block}
.table thead{display:none}
.table tr{border-top:1px solid var(--grid);padding:8px 0}
.table tbody th,.table td{border:0;padding:1px 0;white-space:normal;overflow-wrap:anywhere}
.table td{display:flex;justify-content:space-between;gap:16px;text-align:right}
.table td::before{content:attr(data-label);color:var(--soft);text-align:left}
.table .group{border-left:0}}
"""

SCRIPT = """
'use strict';
for (const figure of document.querySelectorAll('figure.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('.plot>svg'), tip = figure.querySelector('.tip');
  const cursor = svg.querySelector('.cursor'), rule = cursor.querySelector('line');
  const swatches = figure.querySelectorAll('.legend svg.swatch');
  const hidden = new Set(), longest = data.x.reduce((a, b) => b.length > a.length ? b : a, []);
  let at = -1;
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; xs[mid] > x ? high = mid : low = mid; }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };
  const cell = (row, text, tag = 'td') => {
    const node = document.createElement(tag); node.textContent = text;
    row.append(node); return node;
  };
  const leave = () => { at = -1; tip.hidden = true; cursor.setAttribute('visibility', 'hidden'); };
  const show = x => {
    if (!longest.length) return;
    at = nearest(longest, x); x = longest[at];
    rule.setAttribute('x1', x); rule.setAttribute('x2', x);
    cursor.querySelectorAll('circle').forEach(node => node.remove());
    const table = document.createElement('table'), head = table.insertRow();
    cell(head, data.label.replace(/ \\(.*/, '') + ' ' + data.at[data.x.indexOf(longest)][at]);
    if (data.series.some(s => s.plan))
      for (const text of ['realised', 'planned']) cell(head, text, 'th');
    data.series.map((s, i) => [s, i]).sort((a, b) => data.series[0].y ? 0 : b[1] - a[1])
      .forEach(([s, i]) => {
        const own = data.x[s.x], k = own === longest ? at : nearest(own, x);
        if (hidden.has(i) || !own.length || Math.abs(own[k] - x) > 12 && own !== longest) return;
        const row = table.insertRow(), name = cell(row, '');
        name.append(swatches[i].cloneNode(true), s.name);
        cell(row, s.text[k]); if (s.plan) cell(row, s.plan[k]);
        if (s.y && s.y[k] !== null) {
          const dot = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
          dot.setAttribute('cx', own[k]); dot.setAttribute('cy', s.y[k]); dot.setAttribute('r', 4);
          dot.setAttribute('class', s.class); cursor.append(dot);
        }
      });
    tip.replaceChildren(table); tip.hidden = false; cursor.setAttribute('visibility', 'visible');
    const scale = svg.clientWidth / svg.viewBox.baseVal.width, left = x * scale;
    tip.style.left = (left + 16 + tip.offsetWidth > svg.clientWidth
      ? Math.max(0, left - 16 - tip.offsetWidth) : left + 16) + 'px';
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
  });
  svg.addEventListener('pointerleave', leave);
  figure.addEventListener('blur', leave);
  figure.addEventListener('keydown', event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') leave();
    if (!step || event.target !== figure) return;
    event.preventDefault();
    const last = longest.length - 1, next = at < 0 ? last : at + step * (event.shiftKey ? 10 : 1);
    show(longest[Math.min(Math.max(next, 0), last)]);
  });
  // A page that follows a run loads itself anew; what the reader had hidden stays hidden.
  const title = figure.closest('article').id + figure.querySelector('h3').textContent;
  for (const button of figure.querySelectorAll('.legend button')) {
    const index = Number(button.dataset.series), key = title + '/' + data.series[index].name;
    const set = off => {
      off ? hidden.add(index) : hidden.delete(index);
      button.setAttribute('aria-pressed', String(!off));
      svg.querySelector('g.series[data-series="' + index + '"]').classList.toggle('off', off);
      leave();
    };
    try { if (sessionStorage.getItem(key)) set(true); } catch { /* not every browser keeps any */ }
    button.onclick = () => {
      set(!hidden.has(index));
      try {
        hidden.has(index) ? sessionStorage.setItem(key, '1') : sessionStorage.removeItem(key);
      } catch { /* as above */ }
    };
  }
}
"""
