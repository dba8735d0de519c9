"""Bridges to other libraries' models; each module needs its library when it is used, and not before."""
