"""What things cost on a host: a roofline with coefficients from files, corrected by what was measured.

`coefficients.py` reads the layers of YAML, `roofline.py` predicts from them, `residual.py` learns,
`host_model.py` is the two together as the engine's `CostModel`, `calibration.py` measures a host and
`fitting.py` makes coefficients of what it measured. Loads without the runtimes it knows about.
"""
