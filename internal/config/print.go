package config

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// Entry is one setting for display.
type Entry struct {
	Key    string `json:"key"` // "vm.accel"
	Value  any    `json:"value"`
	Source string `json:"source"` // see Origin
	Line   int    `json:"line,omitempty"`
	Doc    string `json:"doc"`
}

// Entries returns all settings in the order of the table. Values are strings,
// numbers, booleans or lists of strings.
func (c *Config) Entries() []Entry {
	all := make([]Entry, len(keys))
	for i, k := range keys {
		o := c.Origin(k.path())
		all[i] = Entry{k.path(), plain(k.field(c)), o.Source, o.Line, k.doc}
	}
	return all
}

// Print writes the settings in force as a TOML file with each key's
// documentation and where its value comes from. Load reads it back to the same
// settings.
func (c *Config) Print(w io.Writer) error {
	b := bufio.NewWriter(w)
	if c.File == "" {
		fmt.Fprintln(b, "# No configuration file was found; these are the settings in force.")
	} else {
		fmt.Fprintf(b, "# The settings in force, with those of %s.\n", quote(c.File))
	}
	for _, s := range sections {
		fmt.Fprintf(b, "\n# %s\n[%s]\n", s.doc, s.name)
		for _, k := range keys {
			if k.section != s.name {
				continue
			}
			fmt.Fprintln(b)
			for _, l := range wrap(k.doc, 78) {
				fmt.Fprintf(b, "# %s\n", l)
			}
			fmt.Fprintf(b, "%s = %s # %s\n", k.name, literal(plain(k.field(c))), c.Origin(k.path()))
		}
	}
	return b.Flush()
}

// String names the origin in a line: "default", "/etc/agentiso/config.toml:3",
// "AGENTISO_VM_ACCEL".
func (o Origin) String() string {
	if o.Line > 0 {
		return fmt.Sprintf("%s:%d", o.Source, o.Line)
	}
	return o.Source
}

// Reference writes the table of all keys in Markdown: docs/config.md.
func Reference(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprint(b, `# Configuration

The daemon and the command line read one TOML file, the first of: the one named by `+"`--config`"+`, the one named by
`+"`AGENTISO_CONFIG`, `$XDG_CONFIG_HOME/agentiso/config.toml`, `/etc/agentiso/config.toml`"+`. None is needed: every key has a
default. A variable such as `+"`AGENTISO_VM_ACCEL`"+` (section and key) takes precedence over the file; lists are separated by
commas. `+"`agentiso config print`"+` shows what is in force and where each value comes from. Unknown keys and bad values are errors.

This page is generated from the table in `+"`internal/config/keys.go`"+`: `+"`go test ./internal/config -update`"+`.
`)
	c := defaults(Host{UID: 1, Getenv: func(string) string { return "" }})
	for _, s := range sections {
		fmt.Fprintf(b, "\n## [%s]\n\n%s\n\n| key | default | meaning |\n| --- | --- | --- |\n", s.name, s.doc)
		for _, k := range keys {
			if k.section != s.name {
				continue
			}
			def := k.defaultDoc
			if def == "" {
				def = "`" + literal(plain(k.field(c))) + "`"
			}
			fmt.Fprintf(b, "| `%s` | %s | %s |\n", k.name, def, strings.ReplaceAll(k.doc, "|", `\|`))
		}
	}
	return b.Flush()
}

// wrap breaks text into lines of at most width bytes where words allow it.
func wrap(text string, width int) []string {
	var lines []string
	l := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case l == "":
			l = word
		case len(l)+1+len(word) > width:
			lines = append(lines, l)
			l = word
		default:
			l += " " + word
		}
	}
	return append(lines, l)
}
