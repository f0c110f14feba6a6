"""How the live page looks: large images beside each other, below each other on a phone, and a focus that is seen."""

STYLE = """
.gradio-container { max-width: min(1320px, 100vw) !important; margin: auto; }
.gradio-container .column, .gradio-container main { min-width: 0 !important; }
#overview h1 { font-size: 1.6rem; margin: 0.5rem 0; }
#overview p { max-width: none; margin: 0.5rem 0; }
#overview dl { display: grid; gap: 0.25rem; margin: 0.5rem 0; }
#overview dl div { display: flex; flex-wrap: wrap; gap: 0 0.75rem; }
#overview dt { font-weight: 600; min-width: 7rem; }
#overview dd { margin: 0; }
#request { align-items: end; }
#images { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(384px, 100%), 1fr)); gap: 1rem; }
#images > * { min-width: 0 !important; }
#images .image-container, #images .image-frame { width: 100%; height: auto; aspect-ratio: 1; }
#images [data-testid="block-label"] { position: static; width: fit-content; }
#images img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#equal { display: grid; place-items: center; min-height: 8rem; text-align: center; font-size: 1.1rem; }
@media (max-width: 500px) { #overview dt { min-width: 100%; } }
#message, #others, #equal { font-size: 1.05rem; }
#others li { margin-left: 1.25rem; list-style: disc; }
#others summary { cursor: pointer; }
#table { overflow-x: auto; max-width: 100%; contain: inline-size; }
#table table { border-collapse: collapse; width: 100%; }
#table :is(table, thead, tbody, tr, th, td) { border: 0 !important; }
#table tr { border-bottom: 1px solid rgb(128 128 128 / 35%) !important; }
#table th, #table td { text-align: left; padding: 0.3rem 0.6rem; }
#download .empty { min-height: 60px; height: 60px; }
#confirmation { border: 2px solid #c0392b; }
:focus-visible { outline: 3px solid #3b82f6 !important; outline-offset: 2px; }
"""
