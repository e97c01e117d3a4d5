"""Predicted steps of machines that are not at hand, by a cost model that is calibrated on measured rows."""
