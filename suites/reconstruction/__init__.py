"""Autoencoder reconstruction: how much of a picture survives decode(encode(x))?"""
