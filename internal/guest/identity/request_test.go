package identity

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
)

// complete is a valid request with every field.
func complete() *guestv1.ConfigureRequest {
	return &guestv1.ConfigureRequest{
		Hostname: "ws-abc12345", Address: "10.99.0.5/16", Gateway: "10.99.0.1", Dns: []string{"1.1.1.1", "2606:4700::1111"},
		Mac: "52:54:00:12:34:56", WallClockUnixNs: time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC).UnixNano(),
		RandomSeed: make([]byte, 32), MachineId: strings.Repeat("0123456789abcdef", 2), Environment: map[string]string{"A": "b"},
		DefaultUser: "root", DefaultWorkdir: "/work", AccessToken: "secret", Mtu: 1400,
	}
}

func TestParseRequest(t *testing.T) {
	tests := []struct {
		name   string
		change func(*guestv1.ConfigureRequest)
		want   string // "" is no error
	}{
		{"complete", func(*guestv1.ConfigureRequest) {}, ""},
		{"least", func(m *guestv1.ConfigureRequest) {
			proto.Reset(m)
			m.RandomSeed, m.WallClockUnixNs = make([]byte, 512), time.Now().UnixNano()
		}, ""},
		{"no seed", func(m *guestv1.ConfigureRequest) { m.RandomSeed = nil }, "random_seed: 0 bytes, want 32 to 512"},
		{"long seed", func(m *guestv1.ConfigureRequest) { m.RandomSeed = make([]byte, 513) }, "random_seed: 513 bytes, want 32 to 512"},
		{"no clock", func(m *guestv1.ConfigureRequest) { m.WallClockUnixNs = 0 }, "wall_clock_unix_ns: 0 is not between the years 2020 and 2200"},
		{"negative clock", func(m *guestv1.ConfigureRequest) { m.WallClockUnixNs = -1 }, "wall_clock_unix_ns: -1 is not between the years 2020 and 2200"},
		{"short mac", func(m *guestv1.ConfigureRequest) { m.Mac = "52:54:00" }, `mac: "52:54:00" is not a 48 bit unicast address`},
		{"multicast mac", func(m *guestv1.ConfigureRequest) { m.Mac = "53:54:00:00:00:01" }, `mac: "53:54:00:00:00:01" is not a 48 bit unicast address`},
		{"zero mac", func(m *guestv1.ConfigureRequest) { m.Mac = "00:00:00:00:00:00" }, `mac: "00:00:00:00:00:00" is not a 48 bit unicast address`},
		{"long mac", func(m *guestv1.ConfigureRequest) { m.Mac = "02:00:5e:10:00:00:00:01" }, `mac: "02:00:5e:10:00:00:00:01" is not a 48 bit unicast address`},
		{"mtu", func(m *guestv1.ConfigureRequest) { m.Mtu = 500 }, "mtu: 500 is not between 576 and 65535"},
		{"no bits", func(m *guestv1.ConfigureRequest) { m.Address = "10.99.0.5" }, `address: "10.99.0.5" is not an address in CIDR form such as 10.99.0.5/16`},
		{"octet", func(m *guestv1.ConfigureRequest) { m.Address = "10.0.0.300/8" }, `address: "10.0.0.300/8" is not an address in CIDR form such as 10.99.0.5/16`},
		{"network", func(m *guestv1.ConfigureRequest) { m.Address = "10.99.0.0/16" }, "address: 10.99.0.0 is the network or broadcast address of 10.99.0.0/16"},
		{"broadcast", func(m *guestv1.ConfigureRequest) { m.Address = "10.99.255.255/16" }, "address: 10.99.255.255 is the network or broadcast address of 10.99.0.0/16"},
		{"loopback", func(m *guestv1.ConfigureRequest) { m.Address = "127.0.0.2/8" }, "address: 127.0.0.2/8 cannot be the address of an interface"},
		{"point to point", func(m *guestv1.ConfigureRequest) { m.Address, m.Gateway = "10.0.0.1/32", "192.168.1.1" }, ""},
		{"v6", func(m *guestv1.ConfigureRequest) { m.Address, m.Gateway = "fd00::5/64", "fd00::1" }, ""},
		{"v6 link-local gateway", func(m *guestv1.ConfigureRequest) { m.Address, m.Gateway = "fd00::5/64", "fe80::1" }, ""},
		{"gateway alone", func(m *guestv1.ConfigureRequest) { m.Address = "" }, ""},
		{"gateway name", func(m *guestv1.ConfigureRequest) { m.Gateway = "router" }, `gateway: "router" is not the address of a machine`},
		{"gateway outside", func(m *guestv1.ConfigureRequest) { m.Gateway = "10.98.0.1" }, "gateway: 10.98.0.1 is not in 10.99.0.0/16"},
		{"gateway itself", func(m *guestv1.ConfigureRequest) { m.Gateway = "10.99.0.5" }, "gateway: 10.99.0.5 is the guest's own address"},
		{"gateway family", func(m *guestv1.ConfigureRequest) { m.Gateway = "fd00::1" }, "gateway: fd00::1 is not of the same family as address 10.99.0.5/16"},
		{"dns", func(m *guestv1.ConfigureRequest) { m.Dns[1] = "1.1.1.1:53" }, `dns[1]: "1.1.1.1:53" is not the address of a machine`},
		{"dns injection", func(m *guestv1.ConfigureRequest) { m.Dns[0] = "fe80::1%a\nsearch evil" }, `dns[0]: "fe80::1%a\nsearch evil" is not the address of a machine`},
		{"dns many", func(m *guestv1.ConfigureRequest) { m.Dns = make([]string, 9) }, "dns: 9 addresses, more than 8"},
		{"host name", func(m *guestv1.ConfigureRequest) { m.Hostname = "a.example-1.org" }, ""},
		{"host name hyphen", func(m *guestv1.ConfigureRequest) { m.Hostname = "-a" }, `hostname: "-a" is not a host name (letters, digits and inner hyphens)`},
		{"host name dots", func(m *guestv1.ConfigureRequest) { m.Hostname = "a..b" }, `hostname: "a..b" is not a host name (letters, digits and inner hyphens)`},
		{"host name newline", func(m *guestv1.ConfigureRequest) { m.Hostname = "a\nb" }, `hostname: "a\nb" is not a host name (letters, digits and inner hyphens)`},
		{"host name long", func(m *guestv1.ConfigureRequest) { m.Hostname = strings.Repeat("a", 65) }, "hostname: 65 bytes, more than 64"},
		{"label long", func(m *guestv1.ConfigureRequest) { m.Hostname = strings.Repeat("a", 64) }, `hostname: "` + strings.Repeat("a", 64) + `" is not a host name (letters, digits and inner hyphens)`},
		{"machine id", func(m *guestv1.ConfigureRequest) { m.MachineId = strings.Repeat("A", 32) }, `machine_id: "` + strings.Repeat("A", 32) + `" is not 32 lower-case hexadecimal digits`},
		{"env name", func(m *guestv1.ConfigureRequest) { m.Environment = map[string]string{"A=B": ""} }, `environment: "A=B" is not a name`},
		{"env zero", func(m *guestv1.ConfigureRequest) { m.Environment = map[string]string{"A": "\x00"} }, `environment: the value of "A" holds a zero byte`},
		{"env long", func(m *guestv1.ConfigureRequest) {
			m.Environment = map[string]string{"A": strings.Repeat("x", 1<<17)}
		}, `environment: "A" is longer than 131071 bytes`},
		{"workdir", func(m *guestv1.ConfigureRequest) { m.DefaultWorkdir = "work" }, `default_workdir: "work" is not an absolute path`},
		{"token", func(m *guestv1.ConfigureRequest) { m.AccessToken = "a b" }, "access_token: holds a character that a header cannot carry"},
		{"link key", func(m *guestv1.ConfigureRequest) { m.LinkKey = make([]byte, 1025) }, "link_key: 1025 bytes, more than 1024"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := complete()
			tt.change(m)
			_, err := parseRequest(m)
			got := ""
			if err != nil {
				got = err.Error()
				if _, ok := errors.AsType[*FieldError](err); !ok {
					t.Errorf("%T names no field", err)
				}
			}
			if got != tt.want {
				t.Errorf("error %q, want %q", got, tt.want)
			}
		})
	}
}

func TestHostsFile(t *testing.T) {
	const local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	tests := []struct{ name, old, host, want string }{
		{"none", "", "ws-1", local + "127.0.1.1\tws-1\t# agentiso\n"},
		{"kept", "127.0.0.1 localhost\n10.0.0.9 db # localhost", "ws-1", "127.0.0.1 localhost\n10.0.0.9 db # localhost\n127.0.1.1\tws-1\t# agentiso\n"},
		{"renamed", local + "127.0.1.1\told\t# agentiso\n10.1.1.1 x\n", "new.example.org", local + "10.1.1.1 x\n127.0.1.1\tnew.example.org new\t# agentiso\n"},
		{"comment only", "# localhost\n", "a", "# localhost\n" + local + "127.0.1.1\ta\t# agentiso\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := string(hostsFile([]byte(tt.old), tt.host))
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
			if again := string(hostsFile([]byte(got), tt.host)); again != got {
				t.Errorf("not stable: %q", again)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	b, err := proto.Marshal(complete())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &guestv1.ConfigureRequest{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		r, err := parseRequest(m)
		if err != nil {
			return
		}
		if strings.Count(string(resolvConf(r)), "\n") != 1+len(r.dns) {
			t.Errorf("resolv.conf: %q", resolvConf(r))
		}
	})
}
