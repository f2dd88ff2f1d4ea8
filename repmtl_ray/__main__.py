"""`python -m repmtl_ray`: the console command `repmtl-ray`."""

from repmtl_ray.cli.console import main

if __name__ == "__main__":
    main()
