"""The style sheet of the pages: layout alone, colours are the variables of figures/palette.py."""

STYLE = """
* { box-sizing: border-box; }
html { scroll-padding-top: 12px; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; font-size: 18px; }
.address { margin: 4px 0 0; color: var(--faint); overflow-wrap: anywhere; }
.finding { margin: 14px 0 4px; font-size: 18px; font-weight: 600; max-width: 80ch; overflow-wrap: anywhere; }
.state { margin: 2px 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 16px 0; font-size: 13.5px; }
a { color: var(--series-1); text-decoration: none; }
a:hover { text-decoration: underline; }
.note { margin: -4px 0 12px; color: var(--faint); font-size: 13.5px; max-width: 80ch; }
.constant { margin: 10px 0 0; color: var(--faint); font-size: 13.5px; overflow-wrap: anywhere; }
.warning { margin: 8px 0; padding: 10px 14px; border-left: 4px solid var(--warn); border-radius: 4px;
  background: var(--warn-paper); color: var(--warn); overflow-wrap: anywhere; }
.sentence { margin: 6px 0; max-width: 90ch; overflow-wrap: anywhere; }
h2 + .sentence { font-weight: 600; }
.explained { margin: 10px 0; font-size: 13.5px; max-width: 90ch; }
.card { padding: 12px; border-radius: 8px; background: var(--card); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0; }
.tile { flex: 1 1 max(130px, calc(100% / var(--columns) - 10px)); padding: 12px 14px; border-radius: 8px;
  background: var(--card); }
.tile span, .tile small { display: block; color: var(--faint); font-size: 12.5px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; }
.charts figure { grid-column: span var(--span); }
.charts + .scroll { margin-top: 12px; }
.pair { display: flex; flex-wrap: wrap; gap: 0 24px; }
.pair > div { flex: 1 1 330px; min-width: 0; }
.pair > div:first-child:not(:only-child) { flex: 2 1 560px; }
figure { margin: 0; min-width: 0; }
.charts figure { padding: 10px 12px 6px; border-radius: 8px; background: var(--card); }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; max-height: 640px; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
.picture { margin: 0 0 20px; }
.picture .scroll { border-radius: 8px; background: var(--card); }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide { max-width: none; width: 1600px; }
.sheet { position: relative; max-width: 100%; margin: 0 auto; }
.sheet.wide { max-width: none; }
.sheet img { width: 100%; }
.sheet .pictures { position: absolute; inset: 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
.short { white-space: nowrap; }
.long { min-width: 16ch; }
dl { display: grid; grid-template-columns: fit-content(45%) 1fr; gap: 3px 20px; margin: 0 0 14px; font-size: 13.5px; }
dt { color: var(--faint); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
code { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--faint); font-size: 13.5px; }
pre { padding: 12px 14px; border-radius: 8px; background: var(--card); font-size: 12.5px; line-height: 1.45;
  overflow-x: auto; }
@media (max-width: 900px) { .charts { grid-template-columns: repeat(2, 1fr); } .charts figure { grid-column: span 1; }
  .charts figure:last-child:nth-child(odd) { grid-column: span 2; } }
@media (max-width: 600px) { .commands { grid-template-columns: 1fr; }
  main { padding: 24px 16px 48px; } .charts { grid-template-columns: 1fr; }
  .charts figure, .charts figure:last-child:nth-child(odd) { grid-column: span 1; }
  .large { max-width: none; width: 720px; } .sheet.large { max-width: none; } }
@media (prefers-color-scheme: dark) { .sheet .ink { filter: invert(1); } .scroll > img { filter: brightness(0.72); } }
"""
