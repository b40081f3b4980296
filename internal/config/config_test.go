package config

import (
	"bytes"
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentiso/agentiso/internal/fault"
)

var update = flag.Bool("update", false, "rewrite golden files and docs/config.md")

var equal = cmp.Options{
	cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}),
	cmpopts.EquateEmpty(),
	cmpopts.IgnoreFields(Config{}, "File", "origins"),
	cmpopts.IgnoreUnexported(Config{}),
}

// host is a user with a home and no session, and the given variables.
func host(env ...string) Host {
	vars := map[string]string{}
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		vars[k] = v
	}
	return Host{UID: 1000, Home: "/home/ada", Getenv: func(k string) string { return vars[k] }}
}

func root(env ...string) Host {
	h := host(env...)
	h.UID, h.Home = 0, "/root"
	return h
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; -update rewrites it):\n%s", path, diff)
	}
}

func TestPrint(t *testing.T) {
	for name, h := range map[string]Host{"root": root(), "user": host()} {
		t.Run(name, func(t *testing.T) {
			c := defaults(h)
			l := &loader{host: h, c: c}
			l.derive()
			c.origins["vm.accel"] = Origin{Source: "AGENTISO_VM_ACCEL"}
			c.origins["vm.init"] = Origin{Source: "/etc/agentiso/config.toml", Line: 3}
			var b bytes.Buffer
			if err := c.Print(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Join("testdata", "print-"+name+".toml"), b.Bytes())
			back, err := Load(write(t, b.String()), h)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c, back, equal); diff != "" {
				t.Errorf("what Print wrote loads as something else (-printed +loaded):\n%s", diff)
			}
		})
	}
}

func TestReference(t *testing.T) {
	var b bytes.Buffer
	if err := Reference(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, filepath.Join("..", "..", "docs", "config.md"), b.Bytes())
}

// TestTable: every field of Config has exactly one key, with documentation and
// a sound default.
func TestTable(t *testing.T) {
	c := defaults(root())
	(&loader{host: root(), c: c}).derive()
	seen := map[any]string{}
	for _, k := range keys {
		p := k.field(c)
		if other := seen[p]; other != "" {
			t.Errorf("%s and %s share a field", k.path(), other)
		}
		seen[p] = k.path()
		if k.doc == "" || !known(k.section) {
			t.Errorf("%s: no documentation or unknown section", k.path())
		}
		if k.check != nil {
			if err := k.check(deref(p)); err != nil {
				t.Errorf("%s: default: %v", k.path(), err)
			}
		}
	}
	fields := 0
	v := reflect.ValueOf(*c)
	for i := range v.NumField() {
		if s := v.Field(i); s.Kind() == reflect.Struct {
			fields += s.NumField()
		}
	}
	if fields != len(keys) {
		t.Errorf("%d fields and %d keys", fields, len(keys))
	}
}

func TestOverrides(t *testing.T) {
	path := write(t, `
server.data_dir = "/srv/iso"
[network]
subnet = "192.168.7.0/24"
dns = ["1.1.1.1", "2606:4700:4700::1111"]
allow_private = ["10.1.2.3/8"]
[vm]
accel = "kvm"
boot_timeout = "2m"
[pool]
enabled = true
`)
	c, err := Load(path, host("AGENTISO_VM_ACCEL=tcg", "AGENTISO_NETWORK_DNS=9.9.9.9, 8.8.8.8", "AGENTISO_RESOURCES_MAX_VCPUS=3",
		"AGENTISO_POOL_ENABLED=0", "AGENTISO_SERVER_LOG_LEVEL=debug"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]any{}
	for _, e := range c.Entries() {
		if e.Source != "default" || strings.HasPrefix(e.Key, "server.run") || e.Key == "server.socket" {
			got[e.Key] = e.Value
		}
	}
	want := map[string]any{
		"server.data_dir": "/srv/iso", "server.run_dir": "/srv/iso/run", "server.socket": "/srv/iso/run/agentiso.sock", "server.log_level": "debug",
		"network.subnet": "192.168.7.0/24", "network.dns": []string{"9.9.9.9", "8.8.8.8"}, "network.allow_private": []string{"10.0.0.0/8"},
		"vm.accel": "tcg", "vm.boot_timeout": "2m", "resources.max_vcpus": 3, "pool.enabled": false,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("settings that are not defaults (-want +got):\n%s", diff)
	}
	if c.VM.BootTimeout != 2*time.Minute {
		t.Errorf("boot timeout %v", c.VM.BootTimeout)
	}
	if o := c.Origin("vm.boot_timeout"); o != (Origin{path, 9}) {
		t.Errorf("origin of vm.boot_timeout: %v", o)
	}
	if o := c.Origin("vm.accel").String(); o != "AGENTISO_VM_ACCEL" {
		t.Errorf("origin of vm.accel: %v", o)
	}
}

func TestProblems(t *testing.T) {
	tests := []struct {
		name string
		host Host
		text string
		want []string // all problems, in order; $F stands for the file
	}{
		{"all at once", host("AGENTISO_VM_INIT=systemd"), `
[server]
sockett = "/x"
log_level = "loud"
data_dir = "relative"
[vmm]
kernel = "a"
[vm]
accel = 3
boot_timeout = "soon"
max_vcpus = 4
[resources]
default_vcpus = 0
max_memory_mb = "8G"
`, []string{
			`$F:3: server.sockett: unknown key (did you mean server.socket?)`,
			`$F:4: server.log_level: "loud" is not one of debug, info, warn, error`,
			`$F:5: server.data_dir: "relative" is not an absolute path`,
			`$F:6: vmm: unknown section (did you mean [vm]?)`,
			`$F:9: vm.accel: 3 is not text in quotes`,
			`$F:10: vm.boot_timeout: "soon" is not a duration such as "90s" or "2m"`,
			`$F:11: vm.max_vcpus: unknown key (did you mean resources.max_vcpus?)`,
			`$F:13: resources.default_vcpus: 0 is outside 1 to 255`,
			`$F:14: resources.max_memory_mb: "8G" is not a whole number`,
			`AGENTISO_VM_INIT: vm.init: "systemd" is not one of fast, image`,
		}},
		{"disagreement", host(), `
[pool]
min_size = 5
max_size = 4
target_free = 6
[resources]
default_disk_gb = 200
default_memory_mb = 9000
[vm]
uid_base = 5000
`, []string{
			`$F:3: pool.min_size: 5 is more than pool.max_size = 4`,
			`$F:5: pool.target_free: 6 is more than pool.max_size = 4`,
			`$F:7: resources.default_disk_gb: 200 is more than resources.max_disk_gb = 100`,
			`$F:8: resources.default_memory_mb: 9000 is more than resources.max_memory_mb = 8192`,
			`$F:10: vm.uid_base: only root can run machines as other users, and this is user 1000; use 0`,
		}},
		{"users", root(), "[vm]\nuid_base = 500\nuid_count = 7", []string{
			`$F:2: vm.uid_base: 500 is among the system's own users; use a range above 1000 that nobody else uses`,
			`$F:3: vm.uid_count: 7 is less than resources.max_workspaces = 100`,
		}},
		{"users at the end", root(), "[vm]\nuid_base = 4294967000", []string{
			`$F:2: vm.uid_base: 65536 users from 4294967000 on do not fit below 4294967293`,
		}},
		{"socket too long", host(), "[server]\nsocket = \"/" + strings.Repeat("s", 120) + "\"", []string{
			`$F:2: server.socket: the path has 121 bytes, and a Unix socket's can have 107`,
		}},
		{"run directory too long", host(), "[server]\nrun_dir = \"/" + strings.Repeat("r", 90) + "\"", []string{
			`$F:2: server.run_dir: the path has 91 bytes, and the sockets below it leave room for 83`,
		}},
		{"no TOML", host(), "[server]\nsocket = /x", []string{
			`$F:2: expected value but found '/' instead`,
		}},
		{"same key twice", host(), "[vm]\naccel = \"kvm\"\naccel = \"tcg\"", []string{
			`$F:3: Key 'vm.accel' has already been defined.`,
		}},
		{"values outside sections", host(), "vm = \"kvm\"\nsocket = \"/x\"\nnetwork = []", []string{
			`$F:1: vm: is a section: write [vm] on a line of its own`,
			`$F:2: socket: unknown key (did you mean server.socket?)`,
			`$F:3: network: is a section: write [network] on a line of its own`,
		}},
		{"tables in tables", host(), "[vm.accel]\nx = 1\n[[pool]]\n", []string{
			`$F:1: vm.accel: a table is not text in quotes`,
			`$F:3: pool: is a section: write [pool] on a line of its own`,
		}},
		{"lists", host(), "[network]\ndns = \"1.1.1.1\"\nallow_private = [\"10.0.0.0\"]\nsubnet = \"10.0.2.7/24\"", []string{
			`$F:2: network.dns: "1.1.1.1" is not a list of addresses such as ["1.1.1.1"]`,
			`$F:3: network.allow_private: "10.0.0.0" does not belong in a list of networks such as ["10.0.0.0/8"]`,
			`$F:4: network.subnet: 10.0.2.7/24 has host bits set; did you mean 10.0.2.0/24?`,
		}},
		{"no home", Host{UID: 7, Getenv: func(string) string { return "" }}, "", []string{
			`default: server.data_dir: there is no home directory to put it in; set it`,
		}},
		{"control characters", host(), "[server]\ndata_dir = \"/a\\nb\"", []string{
			`$F:2: server.data_dir: "/a\nb" has a control character`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := write(t, tt.text)
			_, err := Load(path, tt.host)
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("Load: %v", err)
			}
			problems, ok := errors.AsType[SettingErrors](err)
			if !ok {
				t.Fatalf("no SettingErrors in %v", err)
			}
			got := strings.Split(strings.ReplaceAll(problems.Error(), path, "$F"), "\n")
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			for _, p := range problems {
				if !strings.Contains(err.Error(), p.String()) {
					t.Errorf("the fault does not tell of %s", p)
				}
			}
		})
	}
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	xdg := filepath.Join(dir, "agentiso", "config.toml")
	if err := os.MkdirAll(filepath.Dir(xdg), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(xdg, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	named, byEnv := write(t, ""), write(t, "")
	absent := filepath.Join(dir, "absent")
	tests := []struct {
		name, path string
		env        []string
		want       string
		kind       fault.Kind
	}{
		{"named", named, []string{"AGENTISO_CONFIG=" + byEnv, "XDG_CONFIG_HOME=" + dir}, named, ""},
		{"variable", "", []string{"AGENTISO_CONFIG=" + byEnv, "XDG_CONFIG_HOME=" + dir}, byEnv, ""},
		{"home", "", []string{"XDG_CONFIG_HOME=" + dir}, xdg, ""},
		{"named and absent", absent, nil, "", fault.Missing},
		{"variable and absent", "", []string{"AGENTISO_CONFIG=" + absent, "XDG_CONFIG_HOME=" + dir}, "", fault.Missing},
		{"a directory", dir, nil, "", fault.Missing},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Load(tt.path, host(tt.env...))
			if tt.kind != "" {
				if !fault.Is(err, tt.kind) || fault.As(err).Next == "" {
					t.Errorf("Load: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.File != tt.want {
				t.Errorf("read %s, want %s", c.File, tt.want)
			}
		})
	}
	if diff := cmp.Diff([]string{"/root/.config/agentiso/config.toml", "/etc/agentiso/config.toml"}, root().files()); diff != "" {
		t.Errorf("files of root (-want +got):\n%s", diff)
	}
}

func FuzzLoad(f *testing.F) {
	for _, s := range []string{
		"[server]\nsocket = \"/x\"", "vm = 1", "[vm]\nboot_timeout = \"1m\"", "[vm.accel]", "[[pool]]", "pool = {enabled = true}",
		"[network]\ndns = [\"::1\", 4]", "\"\" = 1", "[\"a.b\"]\n\"\\u0000\" = 1", "[resources]\nmax_vcpus = 99999999999999999999", "[server]\nsocket = '''\nx'''",
		"[network]\nsubnet = \"::ffff:10.0.0.0/24\"", "[vm]\nuid_base = -1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		h := root()
		path := write(t, text)
		c, err := Load(path, h)
		if err != nil {
			if fault.As(err).Kind != fault.Invalid {
				t.Fatalf("Load: %v", err)
			}
			return
		}
		var b bytes.Buffer
		if err := c.Print(&b); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		back, err := Load(path, h)
		if err != nil {
			t.Fatalf("what Print wrote does not load: %v\n%s", err, b.String())
		}
		if diff := cmp.Diff(c, back, equal); diff != "" {
			t.Errorf("what Print wrote loads as something else (-printed +loaded):\n%s", diff)
		}
	})
}
