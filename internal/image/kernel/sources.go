package kernel

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// aptSource is one entry of the host's package sources, in either of apt's two
// notations (sources.list(5)).
type aptSource struct {
	types      []string
	uris       []string
	suites     []string
	components []string
	// signedBy is a key ring's path or an embedded key with its line breaks; ""
	// leaves the choice to apt's trusted keys.
	signedBy string
	// options are the other fields that have to do with reaching or trusting
	// the archive, by their deb822 names.
	options map[string]string
}

// keptOptions are carried into private sources; what narrows them to some
// target, language or time is not.
var keptOptions = []string{"Trusted", "Check-Valid-Until", "Allow-Insecure", "Allow-Weak", "By-Hash"}

// hostSources reads the sources below etcApt (/etc/apt), in apt's order.
// Entries that are switched off, or that make no sense, are left out.
func hostSources(etcApt string) ([]aptSource, error) {
	var all []aptSource
	files, err := filepath.Glob(filepath.Join(etcApt, "sources.list.d", "*"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	for _, path := range append([]string{filepath.Join(etcApt, "sources.list")}, files...) {
		parse := parseOneLine
		switch {
		case strings.HasSuffix(path, ".sources"):
			parse = parseDeb822
		case !strings.HasSuffix(path, ".list"):
			continue
		}
		text, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read package sources: %w", err)
		}
		all = append(all, parse(string(text))...)
	}
	return all, nil
}

// parseDeb822 reads a .sources file.
func parseDeb822(text string) []aptSource {
	var all []aptSource
	for _, st := range parseStanzas(text) {
		if e := strings.ToLower(strings.TrimSpace(st["enabled"])); e == "no" || e == "false" || e == "0" {
			continue
		}
		s := aptSource{
			types: strings.Fields(st["types"]), uris: strings.Fields(st["uris"]),
			suites: strings.Fields(st["suites"]), components: strings.Fields(st["components"]),
			signedBy: strings.TrimSpace(st["signed-by"]), options: map[string]string{},
		}
		for _, k := range keptOptions {
			if v := strings.TrimSpace(st[strings.ToLower(k)]); v != "" {
				s.options[k] = v
			}
		}
		if len(s.uris) > 0 && len(s.suites) > 0 {
			all = append(all, s)
		}
	}
	return all
}

// parseStanzas reads the paragraphs of a deb822 text, keys in lower case. Lines
// that begin with white space continue a value; a comment does not end one.
func parseStanzas(text string) []map[string]string {
	var all []map[string]string
	cur := map[string]string{}
	last := ""
	flush := func() {
		if len(cur) > 0 {
			all = append(all, cur)
		}
		cur, last = map[string]string{}, ""
	}
	sc := bufio.NewScanner(strings.NewReader(text))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), " \t\r")
		switch {
		case line == "":
			flush()
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				cur[last] += "\n" + strings.TrimSpace(line)
			}
		default:
			key, value, ok := strings.Cut(line, ":")
			if !ok {
				last = ""
				continue
			}
			last = strings.ToLower(strings.TrimSpace(key))
			cur[last] = strings.TrimSpace(value)
		}
	}
	flush()
	return all
}

// parseOneLine reads a .list file: "deb [options] uri suite component…".
func parseOneLine(text string) []aptSource {
	var all []aptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		typ, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if typ != "deb" && typ != "deb-src" {
			continue
		}
		s := aptSource{types: []string{typ}, options: map[string]string{}}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			opts, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			rest = after
			for _, kv := range strings.Fields(opts) {
				key, value, _ := strings.Cut(kv, "=")
				if key == "signed-by" {
					s.signedBy = value
				}
				for _, k := range keptOptions {
					short := strings.ToLower(k)
					if key == short {
						s.options[k] = value
					}
				}
			}
		}
		f := strings.Fields(rest)
		if len(f) < 2 {
			continue
		}
		s.uris, s.suites, s.components = f[:1], f[1:2], f[2:]
		all = append(all, s)
	}
	return all
}

// formatSources writes the sources as one deb822 file.
func formatSources(all []aptSource) string {
	var b strings.Builder
	for i, s := range all {
		if i > 0 {
			b.WriteByte('\n')
		}
		// Without Targets, hosts with a software centre would fetch its icons.
		fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\nArchitectures: amd64\nTargets: Packages\n",
			strings.Join(s.uris, " "), strings.Join(s.suites, " "), strings.Join(s.components, " "))
		for _, k := range keptOptions {
			if v := s.options[k]; v != "" {
				fmt.Fprintf(&b, "%s: %s\n", k, v)
			}
		}
		if s.signedBy != "" {
			fmt.Fprintf(&b, "Signed-By: %s\n", strings.ReplaceAll(s.signedBy, "\n", "\n "))
		}
	}
	return b.String()
}

// archiveSources picks from the host's sources the binary entries of the
// distribution itself for release codename, its updates and security included,
// and narrows them to component main. Another vendor's archive may well use the
// same suite name; it gives itself away by its own key.
func archiveSources(all []aptSource, distro, codename string) []aptSource {
	var out []aptSource
	for _, s := range all {
		if !slices.Contains(s.types, "deb") || !slices.Contains(s.components, "main") || foreignKey(s, distro) {
			continue
		}
		var suites []string
		for _, suite := range s.suites {
			// NAME, NAME-updates, NAME-security, and NAME/updates of old.
			if rest, ok := strings.CutPrefix(suite, codename); ok && (rest == "" || strings.HasPrefix(rest, "-") || rest == "/updates") {
				suites = append(suites, suite)
			}
		}
		uris := slices.DeleteFunc(slices.Clone(s.uris), func(u string) bool { return strings.HasPrefix(u, "cdrom:") })
		if len(suites) == 0 || len(uris) == 0 {
			continue
		}
		s.suites, s.uris, s.components = suites, uris, []string{"main"}
		out = append(out, s)
	}
	return out
}

// foreignKey tells whether a source is signed by a key ring that is not the
// distribution's. An embedded key says nothing.
func foreignKey(s aptSource, distro string) bool {
	return s.signedBy != "" && !strings.Contains(s.signedBy, "\n") &&
		!strings.HasPrefix(filepath.Base(s.signedBy), cmp.Or(distro, "?")+"-archive-")
}

// releaseSource derives a source for another release of the same archive: the
// first entry that is the release itself, which is on the same server.
func releaseSource(all []aptSource, codename, release, keyring string) (aptSource, bool) {
	for _, s := range all {
		if slices.Contains(s.suites, codename) {
			s.suites = []string{release}
			s.signedBy = cmp.Or(keyring, s.signedBy)
			return s, true
		}
	}
	return aptSource{}, false
}
