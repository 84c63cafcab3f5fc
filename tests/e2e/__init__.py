"""Whole deployments: real processes over mutual TLS, killed where it hurts."""
