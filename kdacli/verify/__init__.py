"""Checking kernels against the fp64 oracle: a `verification` takes kernels and cases as a `selection` says (`adapt`
brings them within what each kernel supports), or draws them at random (`search`).
"""
