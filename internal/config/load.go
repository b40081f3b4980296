package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"github.com/agentiso/agentiso/internal/fault"
)

// maxFileBytes bounds what is read of a configuration file.
const maxFileBytes = 1 << 20

// A Problem is one thing that is wrong with the settings.
type Problem struct {
	Key    string // "vm.accel"; "" for a file that is no TOML at all
	Source string // as in Origin
	Line   int    // in the file; 0 if it is not known or there is none
	Msg    string
}

func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.Source)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	return b.String() + p.Msg
}

// SettingErrors is everything that is wrong; the cause inside Load's fault.
type SettingErrors []Problem

func (p SettingErrors) Error() string {
	lines := make([]string, len(p))
	for i, q := range p {
		lines[i] = q.String()
	}
	return strings.Join(lines, "\n")
}

// Load finds the settings for h; path is the file named by the user, "" for
// the lookup of the package comment. The error is a fault with every problem on
// a line of its own.
func Load(path string, h Host) (*Config, error) {
	l := &loader{host: h, c: defaults(h)}
	file, text, err := find(path, h)
	if err != nil {
		return nil, err
	}
	l.c.File = file
	if file != "" {
		l.file(file, text)
	}
	l.environment()
	l.derive()
	if len(l.problems) == 0 { // sound values, so it can be asked if they agree
		l.c.agree(h, l.bad)
	}
	if len(l.problems) > 0 {
		return nil, l.fault()
	}
	return l.c, nil
}

func find(path string, h Host) (file string, text []byte, err error) {
	by := "--config"
	if path == "" {
		path, by = h.Getenv("AGENTISO_CONFIG"), "AGENTISO_CONFIG"
	}
	candidates := []string{path}
	if path == "" {
		by, candidates = "", h.files()
	}
	for _, file := range candidates {
		text, err := read(file)
		if by == "" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			next := "See that it is a readable file, or name another with --config."
			if by != "" {
				next = fmt.Sprintf("See that the file named by %s exists and is readable.", by)
			}
			return "", nil, fault.New(fault.Missing, "cannot read configuration: %w", err).WithNext("%s", next)
		}
		return file, text, nil
	}
	return "", nil, nil
}

func read(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxFileBytes {
		return nil, fmt.Errorf("%s has %d bytes; more than %d is no configuration", path, st.Size(), maxFileBytes)
	}
	return os.ReadFile(path)
}

// loader collects settings and what is wrong with them.
type loader struct {
	host     Host
	c        *Config
	problems SettingErrors
}

// bad records that the value of a key, wherever it came from, is wrong.
func (l *loader) bad(path, format string, args ...any) {
	o := l.c.Origin(path)
	l.problems = append(l.problems, Problem{path, o.Source, o.Line, fmt.Sprintf(format, args...)})
}

func (l *loader) fault() error {
	slices.SortStableFunc(l.problems, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.Source, b.Source), a.Line-b.Line, strings.Compare(a.Key, b.Key))
	})
	f := &fault.Error{Kind: fault.Invalid, Err: l.problems}
	if len(l.problems) == 1 {
		f.Msg = "configuration: " + l.problems[0].String()
	} else {
		f.Msg = fmt.Sprintf("configuration: %d problems:\n%s", len(l.problems), l.problems.Error())
	}
	return f.WithNext("Correct the configuration; docs/config.md lists all keys and their values.")
}

// file takes over what text sets.
func (l *loader) file(name string, text []byte) {
	var doc map[string]toml.Primitive
	md, err := toml.NewDecoder(bytes.NewReader(text)).Decode(&doc)
	if err != nil {
		p := Problem{Source: name, Msg: err.Error()}
		if pe, ok := errors.AsType[toml.ParseError](err); ok {
			p.Line, p.Msg = pe.Position.Line, pe.Message
		}
		l.problems = append(l.problems, p)
		return
	}
	unknown := func(path string, prim toml.Primitive, msg string) {
		l.problems = append(l.problems, Problem{path, name, line(&md, prim), msg})
	}
	for section, prim := range doc {
		var value any
		var values map[string]toml.Primitive
		// Decoding into a map takes some values that are no tables, silently.
		_ = md.PrimitiveDecode(prim, &value)
		_, isTable := value.(map[string]any)
		if !known(section) {
			what := "key"
			if isTable {
				what = "section"
			}
			unknown(section, prim, "unknown "+what+didYouMean(section))
			continue
		}
		if !isTable || md.PrimitiveDecode(prim, &values) != nil {
			unknown(section, prim, fmt.Sprintf("is a section: write [%s] on a line of its own", section))
			continue
		}
		for key, prim := range values {
			k, ok := lookup(section, key)
			if !ok {
				unknown(section+"."+key, prim, "unknown key"+didYouMean(section+"."+key))
				continue
			}
			l.c.origins[k.path()] = Origin{Source: name, Line: line(&md, prim)}
			var v any
			if err := md.PrimitiveDecode(prim, &v); err != nil {
				l.bad(k.path(), "%v", err)
				continue
			}
			l.set(k, v)
		}
	}
}

// environment takes over the variables of the table.
func (l *loader) environment() {
	for _, k := range keys {
		if v := l.host.Getenv(k.env()); v != "" {
			l.c.origins[k.path()] = Origin{Source: k.env()}
			l.set(k, envValue(v))
		}
	}
}

// set converts and checks one value.
func (l *loader) set(k key, v any) {
	field := k.field(l.c)
	if err := assign(field, v); err != nil {
		l.bad(k.path(), "%v", err)
		return
	}
	if k.check == nil {
		return
	}
	if err := k.check(deref(field)); err != nil {
		l.bad(k.path(), "%v", err)
	}
}

// derive fills in the paths that depend on other settings and checks them as
// if they had been given.
func (l *loader) derive() {
	s := &l.c.Server
	given := func(path string) bool { _, ok := l.c.origins[path]; return ok }
	if s.DataDir == "" && !given("server.data_dir") {
		l.bad("server.data_dir", "there is no home directory to put it in; set it")
		return
	}
	if !given("server.run_dir") {
		s.RunDir = l.host.runDir(s.DataDir)
	}
	if !given("server.socket") {
		s.Socket = s.RunDir + "/agentiso.sock"
		if err := socketPath(s.Socket); err != nil && len(l.problems) == 0 {
			l.bad("server.socket", "%v", err)
		}
	}
}

// position is decoded into to learn where a value stands: the library tells
// lines in errors only.
type position struct{}

var errPosition = errors.New("position")

func (position) UnmarshalTOML(any) error { return errPosition }

func line(md *toml.MetaData, prim toml.Primitive) int {
	var p position
	if pe, ok := errors.AsType[toml.ParseError](md.PrimitiveDecode(prim, &p)); ok {
		return pe.Position.Line
	}
	return 0
}

func known(section string) bool {
	for _, s := range sections {
		if s.name == section {
			return true
		}
	}
	return false
}

func lookup(section, name string) (key, bool) {
	for _, k := range keys {
		if k.section == section && k.name == name {
			return k, true
		}
	}
	return key{}, false
}

// didYouMean proposes the nearest key or section to what is not known.
func didYouMean(path string) string {
	_, name, inSection := strings.Cut(path, ".")
	if !inSection {
		name = path
	}
	best, bestDistance := "", 3 // two slips of the finger, no more
	try := func(candidate, shown string, d int) {
		if d < bestDistance {
			best, bestDistance = shown, d
		}
	}
	if !inSection {
		for _, s := range sections {
			try(s.name, "["+s.name+"]", distance(path, s.name))
		}
	}
	for _, k := range keys {
		try(k.path(), k.path(), distance(path, k.path()))
		if k.name == name {
			try(k.path(), k.path(), 1) // the right key in the wrong section
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}

// distance is the number of insertions, deletions and replacements between a
// and b. Names that are far too long to be a slip are not compared.
func distance(a, b string) int {
	if len(a) > 64 || !utf8.ValidString(a) {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
