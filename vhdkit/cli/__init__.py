# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call the library, print. The only place that prints or exits.

`main` is the command; `common`, `output`, `progress` and `failure` are shared; every other module is one family of
verbs.
"""
