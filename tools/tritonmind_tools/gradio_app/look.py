"""How the page looks: fonts of the visitor's own system, one accent colour, light and dark; nothing from elsewhere."""

from __future__ import annotations

import gradio as gr

_FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_FONT_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

# Marks a text as math. A lone $ does not: prices have it.
LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]

# Answers stand on the page, questions in a bubble; one column of readable width.
CSS = """
#tm-page { height: calc(100dvh - 2rem); gap: .5rem; flex-wrap: nowrap; }
#tm-page > * { width: 100%; max-width: 52rem; margin-inline: auto; }
#tm-top { flex-wrap: nowrap; align-items: center; gap: .5rem; flex-grow: 0; }
#tm-top button { min-width: fit-content; flex: none; white-space: nowrap; background: transparent;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color); }
#tm-top button:hover { background: var(--background-fill-secondary); }
.tm-header { display: flex; align-items: center; gap: .75rem; min-width: 0; }
.tm-name { font-weight: 650; font-size: 1.1rem; letter-spacing: -.01em; color: var(--body-text-color); }
.tm-status { display: flex; align-items: center; gap: .4rem; min-width: 0; font-size: .8rem; }
.tm-status > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  color: var(--body-text-color-subdued); }
.tm-status i { flex: none; width: .55rem; height: .55rem; border-radius: 50%; background: #16a34a; }
.tm-lost > span { color: var(--error-text-color); }
.tm-lost i { background: #dc2626; }
.tm-note { min-height: 1.2rem; font-size: .78rem; line-height: 1.2rem; text-align: center;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tm-panel-text { font-size: .8rem; color: var(--body-text-color-subdued); }
.tm-problem { color: var(--error-text-color); }
.dark :is(.tm-problem, .tm-lost > span) { color: #f87171; }
#tm-chat { flex: 1 1 0; min-height: 8rem !important; height: auto !important; border: none !important;
  background: transparent; }
#tm-chat .top-panel { display: none; }
#tm-chat .bubble-wrap { background: transparent; }
#tm-chat .placeholder-content { color: var(--body-text-color-subdued); }
#tm-chat .bot.message { border: none; background: transparent; box-shadow: none; padding-inline: 0; }
#tm-chat .bot-row, #tm-chat .bot-row .flex-wrap { max-width: 100%; width: 100%; margin-inline: 0; }
#tm-chat .thought-group { width: 100%; max-width: 100%; box-sizing: border-box; }
#tm-chat .user-row { margin-inline-end: 0; }
#tm-chat [class*=message-buttons] { margin-inline: 0 !important; }
#tm-chat .icon-button-wrapper { border: none; background: transparent; box-shadow: none; }
#tm-chat .icon-button-wrapper button { background: transparent; }
#tm-chat .prose { font-size: .95rem; line-height: 1.6; }
#tm-chat .prose table { display: block; max-width: 100%; overflow-x: auto; border: none; padding: 0;
  margin-block: .75rem; }
#tm-chat .prose :is(th, td) { word-break: normal; overflow-wrap: normal; padding: .35rem .75rem; }
#tm-chat .prose pre, #tm-chat .katex-display { overflow: auto hidden; }
#tm-box { flex-grow: 0; border: 1px solid var(--border-color-primary); border-radius: var(--radius-xl);
  background: var(--input-background-fill); }
#tm-box:focus-within { border-color: var(--color-accent); }
#tm-box *, #tm-box textarea { border: none; box-shadow: none; background: transparent; }
#tm-box textarea { font-size: 1rem; padding: .7rem 1rem; }
#tm-box .input-container { align-items: flex-end; }
#tm-box .input-container button { margin: .35rem; background: var(--color-accent); color: white; }
.tm-panel { gap: .6rem; }
.tm-panel .row { gap: .6rem; flex-wrap: nowrap; }
footer { display: none !important; }
@media (hover: hover) {
  #tm-chat .message-buttons-right, #tm-chat .message-buttons-left { opacity: .5; transition: opacity .15s; }
  #tm-chat .message-wrap > *:hover, #tm-chat [class*=message-buttons]:hover,
  #tm-chat .message-row:hover + [class*=message-buttons] { opacity: 1; }
}
@media (max-width: 640px) {
  #tm-page { height: calc(100dvh - 1rem); }
  #tm-settings { display: none; }  /* the mark at the edge opens them */
  .tm-header { flex-direction: column; align-items: stretch; gap: 0; padding-inline-start: .75rem; }
}
"""

# The choice outlives the page; without one the system's preference counts, which Gradio itself follows.
RESTORE_THEME = """() => {
  const wanted = localStorage.getItem("tritonmind-theme");
  if (wanted) document.body.classList.toggle("dark", wanted === "dark");
}"""
TOGGLE_THEME = """() => {
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("tritonmind-theme", dark ? "dark" : "light");
}"""
# The conversation outlives a reload, which is what Gradio does when its server comes back; each tab has its own. What a
# new page says of its chat before the old one is restored does not count.
KEEP_CHAT = """(chat) => {
  if (!window.tritonmindRestored) return;
  try { sessionStorage.setItem("tritonmind-chat", JSON.stringify(chat)); } catch {}
}"""
RESTORE_CHAT = """() => {
  window.tritonmindRestored = true;
  try { return [JSON.parse(sessionStorage.getItem("tritonmind-chat")) ?? []]; } catch { return [[]]; }
}"""
SHOW_SETTINGS = """() => document.querySelector(".sidebar .toggle-button").click()"""


def theme() -> gr.Theme:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=_FONT,
        font_mono=_FONT_MONO,
    ).set(
        body_text_color_subdued="*neutral_500",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill_dark="*neutral_900",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        code_background_fill_dark="*neutral_900",
        border_color_primary_dark="*neutral_800",
        block_border_width="1px",
        block_shadow="none",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="#1f2a44",
        border_color_accent_subdued="*primary_100",
        border_color_accent_subdued_dark="#2b3a5e",
    )
