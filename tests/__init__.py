"""Tests of core, and what the tests of the plugins share with them."""
