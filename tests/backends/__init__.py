"""Tests of what moves the bytes."""
