"""The ERNIE-4.5 / ERNIE-4.5-VL model: weights, maths, text, image and video input. Imports nothing else of ours."""
