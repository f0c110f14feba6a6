"""How the live page looks: large images beside each other, below each other on a phone, and a focus that is seen."""

STYLE = """
.gradio-container { max-width: 1320px !important; margin: auto; overflow-x: hidden; }
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
#table { overflow-x: auto; }
#table table { border-collapse: collapse; width: 100%; }
#table th, #table td { text-align: left; padding: 0.3rem 0.6rem; border-width: 0 0 1px !important; }
#download .empty { min-height: 60px; height: 60px; }
#confirmation { border: 2px solid var(--error-border-color); }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
"""
