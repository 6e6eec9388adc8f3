"""Decoding and augmenting: from the bytes of a micro-batch to views on the device, by DALI or by torch."""
