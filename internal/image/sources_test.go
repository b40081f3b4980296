package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/fault"
)

func hostTree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestHostDistro(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want distro
	}{
		"debian":     {"ID=debian\nVERSION_CODENAME=bookworm\n", distro{"debian", "bookworm"}},
		"ubuntu":     {"ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\nUBUNTU_CODENAME=noble\n", distro{"ubuntu", "noble"}},
		"derivative": {"ID=linuxmint\nID_LIKE=\"ubuntu debian\"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble\n", distro{"ubuntu", "noble"}},
		"other":      {"ID=fedora\n", distro{}},
	} {
		got, err := hostDistro(hostTree(t, map[string]string{"etc/os-release": tc.text}))
		if got != tc.want {
			t.Errorf("%s is %v", name, got)
		}
		if tc.want == (distro{}) {
			wantFault(t, err, fault.Unsupported)
		}
	}
	_, err := hostDistro(t.TempDir())
	wantFault(t, err, fault.Unsupported)
}

func TestHostSources(t *testing.T) {
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	for _, tc := range []struct {
		name  string
		d     distro
		files map[string]string
		want  []string
	}{
		{"debian, stanzas", distro{"debian", "bookworm"}, map[string]string{
			"etc/apt/sources.list.d/debian.sources": "# comment\nTypes: deb deb-src\nURIs: http://mirror.test/debian/\nSuites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: " + keyring + "\n\n" +
				"Types: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n" +
				"Types: deb-src\nURIs: http://mirror.test/src\nSuites: bookworm\nComponents: main\n\n" +
				"Enabled: no\nTypes: deb\nURIs: http://off.test/debian\nSuites: bookworm\nComponents: main\n",
			"etc/apt/sources.list.d/third.sources": "Types: deb\nURIs: https://third.test/debian\nSuites: bookworm\nComponents: stable\nSigned-By: /etc/apt/keyrings/third.asc\n",
			"etc/apt/sources.list.d/off.disabled":  "deb http://off.test/debian bookworm main\n",
		}, []string{
			"deb [signed-by=" + keyring + "] http://mirror.test/debian bookworm main contrib",
			"deb [signed-by=" + keyring + "] http://mirror.test/debian bookworm-updates main contrib",
			"deb http://mirror.test/debian-security bookworm-security main",
		}},
		{"ubuntu, lines", distro{"ubuntu", "jammy"}, map[string]string{
			"etc/apt/sources.list": "deb http://mirror.test/ubuntu/ jammy main restricted # yes\ndeb http://mirror.test/ubuntu/ jammy-updates main\n" +
				"deb http://mirror.test/ubuntu/ jammy universe\ndeb http://mirror.test/ubuntu/ jammy-backports main\n# deb http://off.test jammy main\n" +
				"deb-src http://mirror.test/ubuntu jammy main\ndeb http://security.test/ubuntu jammy-security main\ndeb [arch=arm64] http://arm.test/ubuntu jammy-updates main\n",
			"etc/apt/sources.list.d/ppa.list":    "deb http://ppa.test/someone/thing/ubuntu jammy main\n",
			"etc/apt/sources.list.d/signed.list": "deb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] http://x.test/ubuntu jammy main\n",
			"etc/apt/sources.list.d/odd.list":    "deb [arch=amd64 http://x.test jammy main\ndeb x\n",
		}, []string{
			"deb http://mirror.test/ubuntu jammy main restricted",
			"deb http://mirror.test/ubuntu jammy-updates main",
			"deb http://mirror.test/ubuntu jammy universe",
			"deb http://security.test/ubuntu jammy-security main",
		}},
		{"one line only", distro{"debian", "sid"}, map[string]string{
			"etc/apt/sources.list": "deb [signed-by=" + keyring + " trusted=no] http://mirror.test/debian sid main\n",
		}, []string{"deb [signed-by=" + keyring + "] http://mirror.test/debian sid main"}},
		{"none", distro{"debian", "bookworm"}, map[string]string{"etc/apt/sources.list": "deb http://mirror.test/debian trixie main\n"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			as, err := hostSources(hostTree(t, tc.files), tc.d)
			var got []string
			for _, a := range as {
				got = append(got, a.line())
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if tc.want == nil {
				wantFault(t, err, fault.Missing)
			}
		})
	}
}

func FuzzSources(f *testing.F) {
	f.Add("deb [arch=amd64] http://x y z\n")
	f.Add("Types: deb\nURIs: x\nSuites: y\nComponents: z\nSigned-By:\n a\n")
	f.Add("deb [ x ] ] y z w")
	f.Fuzz(func(t *testing.T, text string) {
		for _, a := range append(parseList(text), parseDeb822(text)...) {
			if a.uri == "" && a.suite == "" || len(a.components) == 0 {
				t.Errorf("half a source: %+v", a)
			}
		}
	})
}
