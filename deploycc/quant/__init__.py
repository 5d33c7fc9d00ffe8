"""Analyses that choose precision: calibration, sensitivity, cost, allocation. They return data and edit nothing."""
