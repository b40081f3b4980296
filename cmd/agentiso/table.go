package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// table prints rows in columns under a heading.
type table struct {
	w *tabwriter.Writer
}

func newTable(out io.Writer, heading ...string) *table {
	t := &table{tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)}
	t.row(heading...)
	return t
}

// row adds one; cells are cleaned, for names and reasons may be a guest's.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = strings.ReplaceAll(strings.ReplaceAll(clean(c), "\t", " "), "\n", " ")
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() error { return t.w.Flush() }

// field is one line of a description.
type field struct{ name, value string }

// describe prints fields one below the other, without the empty ones.
func describe(out io.Writer, fields ...field) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, f := range fields {
		if f.value != "" {
			fmt.Fprintf(w, "%s:\t%s\n", f.name, strings.ReplaceAll(clean(f.value), "\n", "\n\t"))
		}
	}
	return w.Flush()
}
