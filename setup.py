"""Packaging of ddrepro: everything it says comes from settings.ini."""
import sys

if sys.version_info < (3, 11):
    sys.exit("ddrepro needs Python 3.11 or newer; this is Python %d.%d (%s)." % (*sys.version_info[:2], sys.executable))

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHARED = ["nbs/repro_*.ipynb", "data/**/*"]  # what the installed package carries in ddrepro/_share

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildWithShare(build_py):
    "Copy notebooks, data and the report template into the wheel; a checkout reads them where they are."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return
        share = Path(self.build_lib) / cfg["lib_name"] / "_share"
        shutil.rmtree(share, ignore_errors=True)
        for pattern in SHARED:
            for source in sorted(HERE.glob(pattern)):
                if not source.is_file() or {"__pycache__", ".ipynb_checkpoints"} & set(source.parts): continue
                target = share / source.relative_to(HERE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def requirements(name):
    return cfg[name].split()


def absolute(text):
    "A README whose relative links lead to the repository, for pages that show it elsewhere"
    files, raw = f"{cfg['git_url']}/blob/{cfg['branch']}/", f"{cfg['git_url']}/raw/{cfg['branch']}/"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{raw}", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{files}", text)


readme = HERE / "README.md"
extras = {name.removesuffix("_requirements"): requirements(name) for name in cfg
          if name.endswith("_requirements") and name != "pip_requirements"}
extras["docs"] += extras["notebooks"]
extras["dev"] += [line for name in cfg["dev_extras"].split() for line in extras[name]]
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=absolute(readme.read_text(encoding="utf-8")) if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "nbdev": [cfg["lib_name"] + "=" + cfg["lib_name"] + "._modidx:d"],
    },
    cmdclass={"build_py": BuildWithShare},
    zip_safe=False,
)
