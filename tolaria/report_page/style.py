"""The page's style sheet: light and dark by the reader's choice, one column on a phone, black on white on paper.

Colours were chosen so that text has a contrast of 4.5 or more, lines and shapes of 3 or more, on both grounds; no
meaning hangs on a colour alone.
"""

LIGHT = {
    "ground": "#ffffff", "panel": "#f6f7f9", "ink": "#1b1f24", "soft": "#545d68", "rule": "#d5dae0", "link": "#0550ae",
    "s1": "#0969da", "s2": "#bc4c00", "s3": "#1a7f37", "s4": "#8250df", "s5": "#a40e6f", "s6": "#57606a",
    "s7": "#0b7285", "s8": "#9a6700", "bad": "#cf222e", "warn": "#9a6700", "good": "#1a7f37", "mark": "#fff3bf",
}  # fmt: skip
DARK = {
    "ground": "#0f1318", "panel": "#181d24", "ink": "#e6eaef", "soft": "#a3adb9", "rule": "#333c47", "link": "#79b8ff",
    "s1": "#58a6ff", "s2": "#f0883e", "s3": "#56d364", "s4": "#bc8cff", "s5": "#f778ba", "s6": "#a3adb9",
    "s7": "#39c5cf", "s8": "#e3b341", "bad": "#ff7b72", "warn": "#e3b341", "good": "#56d364", "mark": "#4b3f12",
}  # fmt: skip

_LINES = "".join(f".s{n}{{--c:var(--s{n})}}" for n in range(1, 9))

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:1048px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--rule)}
h3{font-size:15px;margin:20px 0 4px}
p{margin:6px 0}
a{color:var(--link)}
.soft,caption,summary{color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:20px 0 0;padding:0}
.facts div{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:10px 12px}
.facts dt{color:var(--soft);font-size:13px}
.facts dd{margin:0;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.facts dd small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.outcome{font-weight:600}.outcome.good{color:var(--good)}.outcome.bad{color:var(--bad)}.outcome.warn{color:var(--warn)}
nav{margin:18px 0 0;display:flex;flex-wrap:wrap;gap:4px 14px}
.picture{display:block;width:100%;height:auto;overflow:visible}
.narrow{display:none}
.picture text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1.2;opacity:.75}
.line.left{stroke-dasharray:3 4;opacity:.8}
.dot{fill:var(--c);stroke:var(--ground);stroke-width:1}
.thread{stroke:var(--soft);stroke-width:1;stroke-dasharray:1 3}
.target{fill:transparent}
a:focus-visible .target,g:focus-visible .target,a:hover .target{fill:var(--ink);fill-opacity:.1}
svg a:focus,svg g:focus{outline:none}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.glyph{fill:var(--s1);stroke:var(--s1);stroke-width:1;stroke-linejoin:round}
.glyph.operator{fill:var(--s4);stroke:var(--s4)}
.glyph.refused{fill:none;stroke:var(--warn);stroke-width:2.4}
.glyph.incident,.glyph.emergency{fill:var(--bad);stroke:var(--bad)}
.glyph.trouble{fill:var(--warn);stroke:var(--warn)}
.glyph.mode{fill:var(--soft);stroke:var(--soft)}
.glyph.start{fill:var(--good);stroke:var(--good)}
.glyph.paused{fill:none;stroke:var(--soft);stroke-width:2.6}
.on-line{fill:var(--ground);stroke:var(--s1);stroke-width:2}
.on-line.operator{stroke:var(--s4)}.on-line.refused,.on-line.trouble{stroke:var(--warn)}
.on-line.incident,.on-line.emergency{stroke:var(--bad)}
.on-line.mode,.on-line.paused,.on-line.start{stroke:var(--soft)}
.picture text.count{font-size:10px}
.arc{fill:none;stroke:var(--bad);stroke-width:1.6}
.bar{fill:var(--c);stroke:var(--ground);stroke-width:1}
.picture text.on-bar{fill:var(--ground);font-weight:600}
.picture text.halo{fill:var(--ink);paint-order:stroke;stroke:var(--ground);stroke-width:4px}
.picture text.strong{fill:var(--ink);font-weight:600}
.budget{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:6 4}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:4px 0 8px;padding:0;list-style:none;font-size:13px}
.legend li{display:flex;align-items:center;gap:6px;color:var(--soft)}
.legend svg{flex:none}
.swatch{fill:var(--c)}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{text-align:left;padding:2px 0 6px;font-size:13px}
th,td{text-align:left;vertical-align:top;padding:6px 12px 6px 0;border-bottom:1px solid var(--rule)}
thead th{color:var(--soft);font-weight:600;font-size:13px;white-space:nowrap}
tbody th{font-weight:400}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.long td,.long th{overflow-wrap:anywhere;min-width:76px}
.long .tag{white-space:nowrap}
tr:target{background:var(--mark)}
details{margin:8px 0}summary{cursor:pointer;font-size:14px;padding:3px 0}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:12px;overflow-x:auto;font-size:13px}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.93em;overflow-wrap:anywhere}
.tag{display:inline-block;border:1px solid currentColor;border-radius:5px;padding:0 6px;font-size:12.5px}
.tag.good{color:var(--good)}.tag.bad{color:var(--bad)}.tag.warn{color:var(--warn)}
footer{color:var(--soft);font-size:13px;padding-top:32px;padding-bottom:40px}
@media (max-width:700px){
main,header,footer{padding-left:16px;padding-right:16px}
.wide{display:none}.narrow{display:block}
h1{font-size:23px}.facts{grid-template-columns:1fr 1fr}.facts dd{font-size:18px}
.long thead{display:none}.long tr{display:block;padding:8px 0;border-bottom:1px solid var(--rule)}
.long td,.long th{display:block;border:0;padding:1px 0;text-align:left}
.long td:empty{display:none}
.long td::before{content:attr(data-head) ": ";color:var(--soft)}
.long tbody th{font-weight:600}
}
@media print{
details::details-content{content-visibility:visible;block-size:auto}
nav,summary{display:none}details>*{display:block}body{font-size:11pt}h2{break-after:avoid}.picture,tr{break-inside:avoid}
main,header,footer{max-width:none}
}
"""


def sheet() -> str:
    """The whole style sheet."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"@media print{{:root{{{_variables(LIGHT)}}}}}" + _LINES + _RULES
    )


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
