package image

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/agentiso/agentiso/internal/fault"
)

// distro is the host's distribution.
type distro struct {
	ID       string // debian, ubuntu
	Codename string // bookworm, noble
}

// hostDistro reads os-release below root. Derivatives count as the Ubuntu
// that they name.
func hostDistro(root string) (distro, error) {
	text, err := os.ReadFile(filepath.Join(root, "etc/os-release"))
	if err != nil {
		return distro{}, unknownDistro("/etc/os-release cannot be read")
	}
	v := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if k, val, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			v[k] = strings.Trim(val, `"'`)
		}
	}
	like := append([]string{v["ID"]}, strings.Fields(v["ID_LIKE"])...)
	switch {
	case v["UBUNTU_CODENAME"] != "":
		return distro{"ubuntu", v["UBUNTU_CODENAME"]}, nil
	case slices.Contains(like, "debian") && v["VERSION_CODENAME"] != "":
		return distro{"debian", v["VERSION_CODENAME"]}, nil
	}
	return distro{}, unknownDistro(fmt.Sprintf("it is %q", v["ID"]))
}

func unknownDistro(why string) error {
	return fault.New(fault.Unsupported, "the host is not a Debian or Ubuntu release: %s", why).
		WithNext("Pull an image (`agentiso image pull`), or import a root file system.")
}

// source is one archive that apt reads packages from.
type source struct {
	uri        string
	suite      string
	components []string
	signedBy   string // path of a keyring, or ""
}

func (a source) line() string {
	options := ""
	if a.signedBy != "" {
		options = "[signed-by=" + a.signedBy + "] "
	}
	return "deb " + options + a.uri + " " + a.suite + " " + strings.Join(a.components, " ")
}

// hostSources reads the host's apt sources below root and keeps those of the
// distribution itself: the suites of d, and no third party's.
func hostSources(root string, d distro) ([]source, error) {
	files, err := filepath.Glob(filepath.Join(root, "etc/apt/sources.list.d/*"))
	if err != nil {
		return nil, err
	}
	var all []source
	for _, file := range append([]string{filepath.Join(root, "etc/apt/sources.list")}, files...) {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt sources: %w", err)
		}
		switch path.Ext(file) {
		case ".list":
			all = append(all, parseList(string(text))...)
		case ".sources":
			all = append(all, parseDeb822(string(text))...)
		}
	}
	kept := ofDistro(all, d)
	if len(kept) == 0 {
		return nil, fault.New(fault.Missing, "the host's apt sources have no archive of %s %s", d.ID, d.Codename).
			WithNext("Check /etc/apt/sources.list and /etc/apt/sources.list.d, or pull an image instead.")
	}
	return kept, nil
}

// ofDistro keeps d's own archives. A third party may use the same suite name;
// but only the distribution's base archive also has a suite of updates, or is
// signed with the distribution's keyring.
func ofDistro(all []source, d distro) []source {
	base := map[string]bool{}
	for _, a := range all {
		if a.suite == d.Codename+"-updates" {
			base[a.uri] = true
		}
	}
	var kept []source
	for _, a := range all {
		own := strings.HasSuffix(strings.TrimSuffix(a.signedBy, path.Ext(a.signedBy)), "/"+d.ID+"-archive-keyring")
		switch a.suite {
		case d.Codename:
			if a.signedBy != "" && !own || a.signedBy == "" && len(base) > 0 && !base[a.uri] {
				continue
			}
		case d.Codename + "-updates", d.Codename + "-security":
			if a.signedBy != "" && !own {
				continue
			}
		default:
			continue
		}
		if !slices.ContainsFunc(kept, func(b source) bool { return b.line() == a.line() }) {
			kept = append(kept, a)
		}
	}
	return kept
}

// parseList reads the one-line format of sources.list(5).
func parseList(text string) []source {
	var as []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "deb" {
			continue
		}
		f = f[1:]
		var options []string
		if len(f) > 0 && strings.HasPrefix(f[0], "[") {
			end := slices.IndexFunc(f, func(s string) bool { return strings.HasSuffix(s, "]") })
			if end < 0 {
				continue
			}
			options = strings.Fields(strings.Trim(strings.Join(f[:end+1], " "), "[]"))
			f = f[end+1:]
		}
		if len(f) < 3 {
			continue
		}
		a := source{uri: strings.TrimSuffix(f[0], "/"), suite: f[1], components: f[2:]}
		usable := true
		for _, o := range options {
			k, v, _ := strings.Cut(o, "=")
			switch strings.ToLower(k) {
			case "signed-by":
				a.signedBy = keyring(v)
			case "arch":
				usable = slices.Contains(strings.Split(v, ","), "amd64")
			}
		}
		if usable {
			as = append(as, a)
		}
	}
	return as
}

// keyring is v if it is a file; a key written out is left to mmdebstrap, which
// knows the distributions' keyrings itself.
func keyring(v string) string {
	if strings.HasPrefix(v, "/") && !strings.ContainsAny(v, " \n,") {
		return v
	}
	return ""
}

// parseDeb822 reads the stanza format of sources.list(5).
func parseDeb822(text string) []source {
	var as []source
	for _, stanza := range stanzas(text) {
		list := func(key string) []string { return strings.Fields(stanza[key]) }
		arch := list("architectures")
		if !slices.Contains(list("types"), "deb") || stanza["enabled"] == "no" ||
			len(arch) > 0 && !slices.Contains(arch, "amd64") {
			continue
		}
		for _, uri := range list("uris") {
			for _, suite := range list("suites") {
				a := source{strings.TrimSuffix(uri, "/"), suite, list("components"), keyring(stanza["signed-by"])}
				if len(a.components) > 0 {
					as = append(as, a)
				}
			}
		}
	}
	return as
}

// stanzas splits deb822 text; continuation lines are joined with newlines,
// keys are in lower case.
func stanzas(text string) []map[string]string {
	var all []map[string]string
	cur, key := map[string]string{}, ""
	sc := bufio.NewScanner(strings.NewReader(text + "\n\n"))
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			if len(cur) > 0 {
				all = append(all, cur)
			}
			cur, key = map[string]string{}, ""
		case line[0] == ' ' || line[0] == '\t':
			if key != "" {
				cur[key] += "\n" + strings.TrimSpace(line)
			}
		default:
			k, v, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			key = strings.ToLower(strings.TrimSpace(k))
			cur[key] = strings.TrimSpace(v)
		}
	}
	return all
}
