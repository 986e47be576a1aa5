"""Align and aggregate in one linear map: models of equal or different widths become one."""
